"""Places that cannot be written and disks that are full: every verb says so in one sentence and leaves nothing that looks whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from disks import full_disk
from test_export import world  # noqa: F401 (a fixture)

from proglora_jax import tools
from proglora_jax.continual import compile_ahead
from proglora_jax.data.synthetic.benchmark import write_benchmark

VERBS = ["from-hf", "adapter", "merged", "dynamic", "make-benchmark", "make-base"]


def command(verb: str, world, out: Path) -> list[str]:  # noqa: F811
    """The arguments of a verb that writes a folder."""
    if verb == "from-hf":
        return ["convert", "from-hf", str(world.model), "--out", str(out)]
    if verb in ("adapter", "merged", "dynamic"):
        workdir = world.run("proglora_dynamic" if verb == "dynamic" else "lora")
        return ["convert", "to-hf", str(workdir), "--kind", verb, "--out", str(out), "--no-verify"]
    if verb == "make-benchmark":
        return ["make-benchmark", str(out), "--train-size", "2", "--test-size", "2"]
    return ["make-base", "--out", str(out)]


def sentence(capsys) -> str:
    """The one line that a verb ended with."""
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_cannot_be_made(verb, world, tmp_path, capsys):  # noqa: F811
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file" / "out", Path("/proc/nowhere/out"), tmp_path / ("long" * 100)):
        assert tools.main(command(verb, world, out)) == 1
        said = sentence(capsys)
        assert str(out.parent) in said and "partial" not in said and "choose another" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("verb", VERBS[:-1])
def test_a_full_disk(verb, world, tmp_path, capsys):  # noqa: F811
    arguments = command(verb, world, tmp_path / "made" / "out")
    with full_disk(3000):
        assert tools.main(arguments) == 1
    said = sentence(capsys)
    assert str(tmp_path / "made" / "out") in said and "File too large" in said and "partial" not in said
    assert not list((tmp_path / "made").iterdir())
    assert tools.main(arguments) == 0


def test_reports_in_json_come_after_what_is_printed(tmp_path, capsys, monkeypatch):
    write_benchmark(str(tmp_path / "data"), 0, 2, 2)
    (tmp_path / "file").write_text("in the way")
    place = str(tmp_path / "file" / "report.json")
    assert tools.main(["check-data", str(tmp_path / "data"), "--tasks", "GQA", "--counts", "any", "--json", place]) == 1
    said = capsys.readouterr()
    assert said.err == f"error: {place}: cannot be written (Not a directory); check the folder and the free space\n" and "GQA" in said.out
    report = {"fits": True}
    monkeypatch.setattr(compile_ahead, "compile_ahead", lambda config, order: report)
    monkeypatch.setattr(compile_ahead, "compile_text", lambda report: "the table")
    config = str(Path(__file__).parents[2] / "configs" / "coin.py")
    for where in (place, str(tmp_path / "nowhere" / "report.json")):
        assert tools.main(["compile", "--topology", "v5e:1x1", "--config", config, "--json", where]) == 1
        said = capsys.readouterr()
        assert said.out == "the table\n" and said.err.startswith(f"error: {where}: cannot be written (") and said.err.count("\n") == 1
    with full_disk(8):
        assert tools.main(["compile", "--topology", "v5e:1x1", "--config", config, "--json", str(tmp_path / "report.json")]) == 1
    assert "File too large" in sentence(capsys) and sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]


def test_a_report_into_a_folder_that_cannot_be_written(world, tmp_path, capsys, monkeypatch):  # noqa: F811
    from proglora_jax.continual import report

    def full(workdir, against):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_report", full)
    assert tools.main(["report", str(tmp_path)]) == 1
    assert sentence(capsys) == "error: tools report: No space left on device; make room or choose another place, and run it again\n"

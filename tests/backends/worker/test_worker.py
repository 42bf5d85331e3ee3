"""The worker's command line: what is wrong is one line and exit code 2. Running ones are in test_process.py."""

import gc

import pytest

from evenkeel.backends.worker.main import main


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "python:nowhere:make", "--listen", "tcp://:0"], "No module named 'nowhere'"),
        (["--model", "nowhere.json", "--listen", "tcp://:0"], "nowhere.json cannot be read"),
        (["--model", "cifar10-bse", "--listen", "tcp://:0"], "one of cifar10-base, cifar10-light, cifar10-collage-2x2"),
        (
            ["--model", "cifar10-base", "--model", "me=cifar10-base", "--listen", "unix:/proc/w.sock"],
            "cannot listen on",
        ),
        (["--model", "SPEC", "--model", "SPEC", "--listen", "tcp://:0"], "have the same name: same, same"),
        (["--model", "SPEC", "--listen", "tcp://:0", "--threads=0"], "threads: expected a whole number of at least 1"),
        (["--model", "SPEC", "--listen", "unix:/proc/w.sock"], "cannot listen on unix:/proc/w.sock"),
        (["--model", "SPEC", "--listen", "fd:999999"], "fd:999999 is not an open socket"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, says):
    (tmp_path / "same.py").write_text("def make(): return lambda rows: rows")
    spec = f"python:{tmp_path / 'same.py'}:make"
    try:
        assert main([each.replace("SPEC", spec) for each in arguments]) == 2
    finally:
        gc.unfreeze()  # the last case gets as far as freezing what a worker would keep
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_a_worker_whose_parent_is_gone_does_not_start():
    with pytest.raises(SystemExit) as ending:
        main(["--model", "nowhere.json", "--listen", "fd:9", "--parent-pid", "1"])
    assert ending.value.code == 1

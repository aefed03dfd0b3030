"""What a log is told of long work."""

from dtrain.cli import progress as module


def test_the_time_left_counts_from_the_first_block_of_this_call(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with module.progress("packing") as on_block:
        for moment, done in ((100.0, 400), (120.0, 420), (140.0, 440)):  # 100 s to get ready, 400 done before a kill
            now[0] = moment
            on_block(done, 1000)
        now[0] = 1000.0
        on_block(1000, 1000)
    assert capsys.readouterr().err == "dtrain: packing: 440 of 1000, 0:09:20 left\n"

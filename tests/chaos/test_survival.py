"""A sample of the campaigns: kills at every point of a save and elsewhere, and a few faults of each other kind."""

from tests.chaos.kills import elsewhere, in_saves, killed, table


def test_a_run_killed_at_every_point_of_a_save_goes_on_as_if_nothing_had_been(tmp_path):
    results = killed(tmp_path, lambda job: [*in_saves(job)[:-2:4], *elsewhere(job)[1::8]], seed=2, change_shapes=False)
    assert len(results) == 8
    assert all(r.survived for r in results), table(results)
    assert all(r.exact and r.difference == 0 for r in results)
    assert {r.recovered_to % 6 for r in results} == {0}  # each time a checkpoint's step
    assert sum(r.trained_to - r.recovered_to for r in results) > 8  # they did lose steps

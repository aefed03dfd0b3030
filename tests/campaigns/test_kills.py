"""60 SIGKILLs spread over every phase of a save, 20 over steps, evaluations and loading: none costs more than steps.

Each is judged by `dtrain.chaos.campaign`: the next attempt goes on from the newest whole checkpoint, nothing with a
complete name is torn, every loss is that of the run never killed, bit for bit, or to 1e-5 after a change of shape.
"""

from collections import Counter

import pytest

from tests.chaos.kills import damages, elsewhere, in_saves, killed, table

pytestmark = pytest.mark.campaign


def test_sixty_kills_in_saves_and_twenty_elsewhere(tmp_path):
    def draws(job):
        saves = [*in_saves(job) * 2, *in_saves(job)[:12]]
        return [*saves, *elsewhere(job), *elsewhere(job)[:4], *damages(6)]

    results = killed(tmp_path, draws, seed=8, change_shapes=True)
    print(table(results))
    assert [r.plan.what for r in results if not r.survived] == []
    points = Counter(r.plan.schedule.partition("at=")[2].split()[0].partition(":")[0] for r in results)
    assert points["save"] == 60
    assert points["step"] + points["eval"] + points["load"] == 20 + 6
    assert sum(r.exact for r in results) > 40
    assert sum(not r.exact for r in results) > 8  # after a resume in another shape

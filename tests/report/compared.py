"""What a comparison of three runs measured, as its page is made of it."""

METRICS = {name: f"{name}_pixels" for name in ("fd", "precision", "recall", "density", "coverage")}
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # one pixel


def point(steps: int, evaluations: float, seconds: float, fd: float, recall: float) -> dict:
    metrics = {METRICS["fd"]: fd, METRICS["recall"]: recall, METRICS["precision"]: 0.5}
    metrics |= {METRICS["density"]: 1.25, METRICS["coverage"]: 0.75}
    return {"steps": steps, "evaluations": evaluations, "seconds_per_thousand": seconds, "metrics": metrics}


def run(name: str, own: dict, *others: dict, energy=None, begun_with=None, **settings) -> dict:
    context = {"sampler": "ddim", "steps": own["steps"], "guidance": 1.0, "ema": "ema_0", "seed": 0} | settings
    pictures = [{"steps": p["steps"], "evaluations": p["evaluations"], "seconds": 0.25, "png": DOT} for p in (own,)]
    pictures += [{"steps": p["steps"], "evaluations": p["evaluations"], "seconds": 1.5, "png": DOT} for p in others]
    training = {"images": 1000, "seconds": 61.0, "energy_watt_hours": energy, "begun_with": begun_with}
    return {
        **{"name": name, "path": f"runs/{name}", "step": 10, "images": 1000, "parameters": 725_000, "own": own},
        **{"curve": sorted([own, *others], key=lambda p: p["evaluations"]), "context": context, "training": training},
        **{
            "process": "flow",
            "classes": 10,
            "words": False,
            "walks": True,
            "pictures": pictures,
            "left_out": {"999": "too many"},
        },
    }


def three_runs() -> dict:
    """One that is good and slow, one that is quick, and one that is better in nothing than that."""
    slow = run("slow <b>", point(50, 50, 20.0, 0.5, 0.8), point(5, 5, 2.0, 1.0, 0.4), energy={"gpu_energy": 12.5})
    quick = run("quick", point(1, 1, 0.2, 2.0, 0.2), begun_with="runs/slow", sampler="euler")
    worse = run("worse", point(2, 2, 0.4, 2.5, 0.1))
    return {
        **{"device": "a device", "versions": {"dtrain": "1", "torch": "2"}, "n": 48, "features": "pixels"},
        **{"held_out": {"path": "h/manifest.json", "hash": "f" * 64, "samples": 360}, "statistics": None},
        **{"labels": "data", "timed_blocks": 3, "metrics": METRICS, "runs": [slow, quick, worse]},
        "picture": {"label": 3, "prompt": None, "seed": 7, "size": 8},
    }

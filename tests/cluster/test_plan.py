"""The plan against what torch and DeepSpeed really compute and hold."""

import gc
import json
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from dtrain.cluster.cost import FUSED_ATTENTION, _Accelerator, activations, flops_per_image
from dtrain.cluster.memory import Sizes, checkpoint_bytes, state
from dtrain.cluster.plan import ActivationBytes, plan
from dtrain.config import load
from dtrain.models.build import allocate, build
from dtrain.models.layers import Attention
from dtrain.models.mmdit import MMDiTBlock
from dtrain.training.record.throughput import training_flops
from tests.command_line import command, failing
from tests.digits import CONFIG, tiny
from tests.longer import mostly_longer
from tests.ranks import run_ranks
from tests.shared_memory import needs_root, own_shared_memory

UNET = "model={name: unet, width: 32, multipliers: [1, 2], attention: [16], res_blocks: 2}"
ADM = "model={name: unet, width: 48, multipliers: [1, 2, 2], attention: [8], head_width: 24, scale_shift: true, "
ADM += "dropout: 0.1, num_classes: 10, res_blocks: 1}"
MMDIT = "model={name: mmdit, depth: 2, width: 192, heads: 6, patch: 4, num_classes: 10}"
WORDS = "conditions={text: {length: 24, width: 32, depth: 1}}"
MODELS = {
    "dit": ["model={name: dit, depth: 4, width: 384, heads: 6, patch: 2, num_classes: 10}"],
    "mmdit": [MMDIT, WORDS],
    "unet": [UNET],
    "unet with dropout and heads": [ADM],
}


def config_of(model: str, *overrides: str):
    shape = ["data.image_size=32", "data.channels=3", "deepspeed.zero_stage=1"]
    return load(CONFIG, [*shape, *MODELS[model], *overrides])


def real(config, rows: int, checkpointing: bool):
    """(the model with weights, a call of it) on the CPU; each gradient goes as soon as it is there."""
    model = build(config).train()
    model.activation_checkpointing = checkpointing
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    labels = torch.zeros(rows, dtype=torch.long)
    inputs = [torch.randn(rows, 3, 32, 32), torch.full((rows,), 500.0), labels]
    inputs += [labels] if getattr(model, "dropout", 0) else []
    words = {"text": torch.zeros(rows, 24, dtype=torch.long), "text_mask": torch.ones(rows, 24, dtype=torch.bool)}
    return model, partial(model, *inputs, **(words if config.texts else {}))


def measured_activations(config, rows: int, checkpointing: bool) -> tuple[int, int]:
    """(bytes held when the loss is there, most bytes) by torch's own record of every allocation on the CPU."""
    _, forward = real(config, rows, checkpointing)
    autocast = config.deepspeed.precision == "bf16_autocast"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = forward()
        loss = loss.float().square().mean()
        with record_function("forward is done"):
            pass
        loss.backward()
    held = most = saved = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
        elif event.name() == "forward is done":
            saved = held
    return saved, most


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_to_masked_tokens_is_two_products(autocast):
    """16 tokens to 44, in 2 heads of 8 channels, for 3 rows; with a mask as with none."""
    q, k = (torch.empty(3, 2, tokens, 8, device="meta") for tokens in (16, 44))
    for mask in ([], [torch.empty(3, 1, 1, 44, dtype=torch.bool, device="meta")]):
        with FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION) as counter, _Accelerator(autocast, "cuda"):
            found = F.scaled_dot_product_attention(q, k, k, *mask)
        assert found.shape == q.shape
        assert found.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert counter.get_total_flops() == 2 * 2 * 3 * 2 * 16 * 44 * 8


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
@pytest.mark.parametrize("model", MODELS)
def test_activations_are_those_that_torch_allocates_within_15_percent(model, precision):
    config = config_of(model, f"deepspeed.precision={precision}")
    for checkpointing in (False, True):
        saved, most = measured_activations(config, 8, checkpointing)
        found = activations(config, 8, checkpointing, device="cpu")
        assert found.saved == pytest.approx(saved, rel=0.02)
        # A CPU without bf16 units computes products in fp32, on copies that no accelerator makes.
        if precision == "fp32" or (torch.cpu._is_avx512_bf16_supported() and not checkpointing):
            assert found.peak == pytest.approx(most, rel=0.15), checkpointing


def test_activations_between_two_traced_micro_batches_are_never_underestimated():
    config = config_of("dit")
    for checkpointing in (False, True):
        by_chord = ActivationBytes(config, 32, checkpointing)
        for rows in (1, 2, 8, 32):
            traced = activations(config, rows, checkpointing).peak
            assert traced <= by_chord(rows) <= 1.05 * traced


def by_hand(config) -> int:
    """Operations of forward and backward from the shapes that pass through the layers of a real forward pass."""
    model, call = real(config, 1, checkpointing=False)
    forward, first = 0, 0

    def count(layer, arguments, out):
        nonlocal forward, first
        if isinstance(layer, nn.Linear):
            forward += (n := 2 * out.numel() * layer.in_features)
        elif isinstance(layer, nn.Conv2d):
            forward += (n := 2 * out.numel() * layer.in_channels * layer.kernel_size[0] ** 2)
        elif isinstance(layer, MMDiTBlock):
            (_, tokens, width), text = out[0].shape, out[1].shape[1]
            forward += 4 * (tokens if layer.text.last else tokens + text) * (tokens + text) * width
            return
        else:  # Q K^T and the product with V
            tokens, width = out.shape[1:]
            forward += (n := 4 * tokens**2 * width)
        first += 0 if arguments[0].requires_grad else n  # nobody asks for the gradient of an image or a time

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | Attention | MMDiTBlock):
            layer.register_forward_hook(count)
    call()
    return 3 * forward - first


@pytest.mark.parametrize("model", MODELS)
def test_operations_are_those_counted_by_hand_and_by_torch_within_1_percent(model):
    config = config_of(model)
    found = flops_per_image(config, checkpointing=False)
    assert found == pytest.approx(by_hand(config), rel=0.01)
    assert found == pytest.approx(training_flops(config), rel=0.01)
    for checkpointing in (False, True):
        _, call = real(config, 1, checkpointing)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call().square().mean().backward()
        assert flops_per_image(config, checkpointing) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_published_model_has_its_published_size_and_operations():
    """DiT-XL/2 on latents of 32 × 32 (Peebles & Xie 2023, table 1: 675 M, 118.64 Gflops, which are multiply-adds)."""
    config = load(CONFIG, ["model={name: dit, size: XL/2, num_classes: 1000}", "data.image_size=32"])
    with torch.device("meta"):
        sizes = Sizes.of(allocate(config))
    assert sizes.trainable == pytest.approx(675e6, rel=0.005)
    assert flops_per_image(config, checkpointing=False) == pytest.approx(3 * 2 * 118.64e9, rel=0.01)


def held(config) -> tuple[int, int]:
    """(bytes of all tensors that came to this process with the engine, between backward pass and step; of a save)."""
    from tests.training.players import batch_losses, build_player

    before = storages()
    engine = build_player(config)
    for step in (1, 2):
        for losses in batch_losses(engine, config, step):
            engine.backward(losses.mean())
        if step == 1:
            engine.step(1e-3)
    del losses
    now = storages()
    return sum(size for at, size in now.items() if at not in before), 4 * sum(engine.tensor_sizes().values())


def storages() -> dict[int, int]:
    """Address → bytes of every tensor's memory in this process."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not o.is_meta]
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {at: size for at, size in found.items() if at}


@pytest.mark.parametrize("depth", [1, pytest.param(3, marks=pytest.mark.campaign)])
@pytest.mark.parametrize(
    ("stage", "precision", "ranks"),
    mostly_longer(
        [(stage, "fp32", ranks) for stage in range(4) for ranks in (1, 2, 3)] + [(s, "bf16", 3) for s in (1, 2, 3)],
        stay=[(0, "fp32", 2), (1, "fp32", 3), (2, "bf16", 3), (3, "fp32", 1), (3, "fp32", 2)],
    ),
)
def test_the_fullest_rank_holds_what_the_plan_says_within_5_percent(digits, tmp_path, stage, precision, ranks, depth):
    shape = [f"model.depth={depth}", "model.width=160", "ema=[{decay: 0.9}, {decay: 0.99}]"]
    config = tiny(digits, tmp_path, f"deepspeed.zero_stage={stage}", f"deepspeed.precision={precision}", *shape)
    with torch.device("meta"):
        sizes = Sizes.of(allocate(config))
    planned = state(config.deepspeed, 2, sizes, ranks, stage)
    measured, saved = zip(*run_ranks(held, ranks, config, timeout=600), strict=True)
    assert planned.device == pytest.approx(max(measured), rel=0.05)
    assert set(saved) == {checkpoint_bytes(sizes, 2)}


def test_what_a_rank_touches_is_what_brute_force_finds():
    each = (7, 1, 40, 3, 3, 90, 2, 11)
    owners = [n for n, size in enumerate(each) for _ in range(size)]
    for ranks in (1, 2, 3, 5, 60):
        sizes = Sizes(each, 0)
        share = sizes.share(ranks, 1)
        touched = [{owners[i] for i in range(r * share, min((r + 1) * share, len(owners)))} for r in range(ranks)]
        assert sizes.touched(ranks) == max(sum(each[n] for n in names) for names in touched)


def test_what_does_not_fit_is_said_and_what_is_recommended_fits(digits, tmp_path):
    path = tmp_path / "big.yaml"
    size = ["model={name: dit, size: S/2, num_classes: 10}", "data.image_size=32", "data.batch_size=256"]
    path.write_text(load(CONFIG, [*size, "deepspeed.zero_stage=0", "run.name=big"]).dump())
    ranks = ["--nodes", 2, "--gpus-per-node", 8, "--gpu-memory", 0.9, "--json"]
    code, text = run_ranks(command, 1, "plan", path, *ranks, timeout=600)[0]
    found = json.loads(text)
    assert (code, found["fits"], found["gpus"], found["rows"]) == (1, False, 16, 16)
    assert found["usable"] < found["stages"][0]["needed"]
    code, text = run_ranks(command, 1, "plan", path, *found["recommended"], "eval.batch_size=8", *ranks, timeout=600)[0]
    assert (code, json.loads(text)["fits"]) == (0, True)
    code, text = run_ranks(command, 1, "plan", path, "--gpu-memory", 0.2, timeout=600)[0]
    assert code == 1
    assert "does not fit" in text
    assert "nothing fits" in text


def planned_in(size, *arguments):
    own_shared_memory(size)
    return command(*arguments)


@needs_root
def test_what_batches_made_ahead_take_of_dev_shm_is_said_and_what_to_do_where_this_machine_has_less(digits, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny(digits, tmp_path, "data.batch_size=32768", "data.workers=2").dump())
    asks = ["plan", tmp_path / "tiny.yaml", "--nodes", 2, "--gpus-per-node", 4]
    rows, pages = 32768 // 8, 4096
    image, number = (-(-rows * size // pages) * pages for size in (8 * 8, 8))
    batch = image + 4 * number  # image; k, label, time and drop
    node = 4 * ((2 * 2 + 1) * batch + 14 * pages)  # and a page for each of 14 locks
    ((code, text),) = run_ranks(planned_in, 1, "2m", *asks, "--json")
    assert (code, json.loads(text)["shared_memory"], json.loads(text)["shared_memory_here"]) == (0, node, 2 * 2**20)
    ((code, text),) = run_ranks(planned_in, 1, "2m", *asks)
    assert code == 0
    assert "batches made ahead: up to 0.01 GiB of a node's /dev/shm; this machine has 0.00 GiB free" in text
    assert "--ipc=host" in text


def test_hours_are_operations_over_speed(digits, tmp_path):
    config = tiny(digits, tmp_path, "train.steps=1000")
    found = plan(config, nodes=1, gpus_per_node=2, gpu_memory=80, mfu=0.5, tflops=100)
    assert found.hours == pytest.approx(1000 * 24 * found.flops_per_image / (2 * 0.5 * 100e12) / 3600)
    again = plan(tiny(digits, tmp_path, "train.steps=1000", "train.activation_checkpointing=true"), 1, 2, 80, 0.5, 100)
    assert again.hours / found.hours == pytest.approx(1 + found.recomputed_per_image / found.flops_per_image)


def test_the_energy_is_hours_times_gpus_times_power_of_whoever_tells_it_first(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("dtrain.cluster.energy.power_limit", lambda: 500.0)
    config = tiny(digits, tmp_path, "train.steps=1000", "tracking.carbon_intensity=350")

    def planned(*watts):
        return plan(config, 2, 4, 80, 0.5, 1e-3, *watts)

    found = planned(700.0)
    assert (found.energy.watts, found.energy.watts_from) == (700.0, "--watts")
    assert found.energy.kilowatt_hours == pytest.approx(0.7 * 8 * found.hours)
    assert found.energy.kilograms == pytest.approx(0.35 * 0.7 * 8 * found.hours)
    assert planned().energy.watts == 500.0
    assert planned().energy.watts_from.startswith("the power limit of this machine's GPUs")
    monkeypatch.setattr("dtrain.cluster.energy.mean_watts", lambda journal: {config.run.path: 420.0}[journal.parent])
    assert planned().energy.kilowatt_hours == pytest.approx(0.42 * 8 * found.hours)
    assert "took so far" in planned().energy.watts_from
    untold = tiny(digits, tmp_path, "train.steps=1000")
    assert plan(untold, 2, 4, 80, 0.5, 1e-3, 700.0).energy.kilograms is None


def test_the_energy_is_called_an_estimate_with_what_it_leaves_out_or_not_known_and_how_to_tell_it(digits, tmp_path):
    given = ["train.steps=1000", "tracking.carbon_intensity=350"]
    (tmp_path / "tiny.yaml").write_text(tiny(digits, tmp_path, *given).dump())
    asks = ["plan", tmp_path / "tiny.yaml", "--gpus-per-node", 4, "--peak-tflops", 0.001]
    ((code, text),) = run_ranks(command, 1, *asks, "--json", "--watts", 700)
    energy, hours = json.loads(text)["energy"], json.loads(text)["hours"]
    assert (code, energy["kilowatt_hours"]) == (0, pytest.approx(0.7 * 4 * hours))
    ((_, text),) = run_ranks(command, 1, *asks, "--watts", 700)
    figures = (
        f"{energy['kilowatt_hours']:,.3g} kWh, {energy['kilograms']:,.3g} kg of CO₂ at 350 g/kWh, by 4 GPUs of 700 W"
    )
    assert f"energy: an estimated {figures} (--watts); evaluations, CPUs, memory, network and cooling are not" in text
    ((code, text),) = run_ranks(command, 1, *asks)
    if not shutil.which("nvidia-smi"):
        assert "energy: not known; tell the watts of one GPU with --watts, such as 700 of an H100 SXM" in text
    assert code == 0
    assert failing(*asks, "--watts", "inf") == "--gpu-memory, --peak-tflops and --watts are finite numbers"


def test_frozen_text_encoders_are_counted_and_so_are_the_bytes_of_a_cache(tmp_path):
    """T5's 512 tokens of 4,096 channels in bfloat16 are 4.19 MB a caption."""
    transformers = pytest.importorskip("transformers")
    from tests.conditions.encoder_folders import written

    folder = written("bert", tmp_path / "bert")
    own = (f"conditions.text.encoder={folder}", "conditions.text.length=8", "data.batch_size=4")
    online = tiny(tmp_path, tmp_path, *own)
    cached = tiny(tmp_path, tmp_path, *own, "conditions.text.cached=float16")
    real = sum(p.nbytes for p in transformers.BertModel.from_pretrained(folder).parameters())
    plans = [plan(config, 1, 1, 80, 0.4, None) for config in (online, cached)]
    assert [p.text.weights for p in plans] == [real, real]
    assert [p.text.in_steps for p in plans] == [real, 0]
    assert plans[0].stages[0].needed - plans[1].stages[0].needed == real
    assert plans[0].text.flops_per_image == 2 * 8 * real // 4
    assert plans[0].hours > plans[1].hours
    assert plans[1].text.cached[0].each == 8 * 32 * 2
    (tmp_path / "t5").mkdir()
    shape = {"model_type": "t5", "d_model": 4096, "d_ff": 64, "d_kv": 64, "num_layers": 1, "num_heads": 1}
    (tmp_path / "t5" / "config.json").write_text(json.dumps(shape))
    words = {"encoder": tmp_path / "t5", "length": 512, "cached": "bfloat16", "precision": "bf16"}
    given = [f"conditions.text.{key}={value}" for key, value in words.items()]
    (tmp_path / "text.yaml").write_text(tiny(tmp_path, tmp_path, *given).dump())
    ((code, said),) = run_ranks(command, 1, "plan", tmp_path / "text.yaml", "--gpus-per-node", 1)
    assert code == 0, said
    said = " ".join(said.split())
    assert "at most 512 tokens × 4096 in bfloat16, 4.19 MB a caption; of a million at most 4.19 TB on disk" in said

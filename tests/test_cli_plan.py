"""python -m moe_gpu plan: Mixtral-8x7B by hand, what is printed, and refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from mixtral import EXPERT_BYTES, make_config
from moe_gpu.__main__ import main
from moe_gpu.huggingface import plan as planner
from moe_gpu.huggingface.plan import plan_memory
from moe_gpu.huggingface.plan_text import plan_text, size
from moe_gpu.huggingface.quantized import describe_quantization, refuse_quantized

ROOT = Path(__file__).parent.parent
GIB = 2**30
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",  # as the published config spells it
}
EXPERT = 3 * 4096 * 14336 * 2
# q, o; k, v; router; two norms; embedding and head, last norm; two rotary buffers of 64 float32
LAYER = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 8 * 4096 + 2 * 4096
DENSE = 2 * (32 * LAYER + 2 * 32000 * 4096 + 4096) + 2 * 64 * 4
KV_4096 = 4096 * 2 * 32 * 8 * 128 * 2
# hidden states 6 D, pairs K D (3 + float32), expert 3 F; logits in float32
WORKSPACE_4096 = 4096 * (6 * 4096 * 2 + 2 * 4096 * (3 * 2 + 4) + 3 * 14336 * 2) + 32000 * 4


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with 128 GiB free."""
    monkeypatch.setattr(planner, "available_memory", lambda: 128 * GIB)


@pytest.fixture
def mixtral(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    return tmp_path  # no weights


def run(capsys, *arguments):
    assert main(["plan", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_mixtral_8x7b_on_24_gib(mixtral):
    plan = plan_memory(mixtral, gpu_memory="24GiB")
    assert EXPERT == 352_321_536
    assert plan.model.expert_bytes == EXPERT
    assert plan.model.experts_bytes == 256 * EXPERT == 90_194_313_216
    device = plan.device
    assert (device.dense_bytes, device.kv_cache_bytes) == (DENSE, KV_4096)
    assert device.workspace_bytes == WORKSPACE_4096
    assert device.everything_resident_bytes == (DENSE + KV_4096 + WORKSPACE_4096 + 90_194_313_216)
    left = 24 * GIB - DENSE - KV_4096 - WORKSPACE_4096 - 2 * EXPERT
    assert left // EXPERT == 57
    assert (device.slots, device.slots_per_layer, device.pool) == (57, 1, True)
    assert device.slots_bytes == 57 * EXPERT and device.staging_bytes == 2 * EXPERT
    assert device.unused_bytes == left - 57 * EXPERT

    # 80 % of 128 GiB hold all, half of it pins 195 of them
    assert plan.host.experts == {"pinned": 195, "pageable": 61, "disk": 0}
    assert plan.host.bytes == {"pinned": 195 * EXPERT, "pageable": 61 * EXPERT, "disk": 0}
    traffic = plan.traffic
    assert traffic.pairs_per_token == 64
    assert traffic.misses_per_token == pytest.approx(12.8)
    assert traffic.bytes_per_token == 4_509_715_661  # 12.8 x 352,321,536
    assert traffic.link_tokens_per_s == pytest.approx(5.5436, abs=1e-4)  # 25e9 of these
    assert traffic.disk_bytes_per_token == 0 and traffic.disk_tokens_per_s is None
    assert traffic.tokens_per_s == traffic.link_tokens_per_s
    assert plan.notes == ()


def test_slots_per_layer_and_everything_resident(mixtral):
    needs = DENSE + KV_4096 + WORKSPACE_4096
    plan = plan_memory(mixtral, gpu_memory=needs + (2 + 4 * 32) * EXPERT)
    assert (plan.device.slots_per_layer, plan.device.pool) == (4, False)
    plan = plan_memory(mixtral, gpu_memory=needs + 256 * EXPERT)
    assert (plan.device.slots, plan.device.pool, plan.device.staging_bytes) == (256, False, 0)
    assert plan.traffic.hit_rate == 1 and plan.traffic.bytes_per_token == 0
    assert plan.traffic.tokens_per_s is None
    assert plan.notes == ("every expert is resident: no expert ever moves",)


def test_slots_below_one_token_lower_the_hit_rate(mixtral):
    plan = plan_memory(mixtral, gpu_memory="12GiB")
    assert plan.device.slots == 21
    assert plan.traffic.assumed_hit_rate == 0.8
    assert plan.traffic.hit_rate == 21 / 64 and plan.traffic.misses_per_token == 43
    assert plan.notes == (
        "a hit rate of 80.0% is out of reach: 21 slots for the 64 experts of one token allow "
        "32.8% at most, which is counted with",
    )


def test_experts_on_disk_bound_the_rate_too(mixtral):
    plan = plan_memory(
        mixtral, host_memory=64 * EXPERT, pinned_memory=32 * EXPERT, hit_rate=0.5, disk_gbps=3
    )
    assert plan.host.experts == {"pinned": 32, "pageable": 32, "disk": 192}
    traffic = plan.traffic
    assert traffic.bytes_per_token == 32 * EXPERT and traffic.disk_bytes_per_token == 24 * EXPERT
    assert traffic.link_tokens_per_s == pytest.approx(25e9 / (32 * EXPERT))
    assert traffic.tokens_per_s == traffic.disk_tokens_per_s
    assert traffic.disk_tokens_per_s == pytest.approx(3e9 / (24 * EXPERT))


def test_a_host_budget_above_this_machine_is_a_note(mixtral, monkeypatch):
    monkeypatch.setattr(planner, "available_memory", lambda: GIB)
    plan = plan_memory(mixtral, host_memory="64GiB")
    assert plan.host.host_memory == 64 * GIB and plan.host.pinned_memory == GIB // 2
    assert plan.notes == (
        "experts are to take 68,719,476,736 bytes of host memory, 1,073,741,824 are available",
    )


@pytest.mark.parametrize(
    "config, dtype, expected, itemsize",
    [
        (None, "auto", "bfloat16", 2),  # nothing said
        ("float32", "auto", "float32", 4),
        ("float32", "bfloat16", "bfloat16", 2),
        ("bfloat16", "float32", "float32", 4),
    ],
)
def test_dtype(config, dtype, expected, itemsize):
    plan = plan_memory(make_config(dtype=config), dtype=dtype)
    assert plan.model.dtype == expected
    assert plan.model.expert_bytes == EXPERT_BYTES // 4 * itemsize


TEXT = """\
mixtral, bfloat16: 32 MoE layers of 8 experts of 336.00 MiB, 2 per token

Device memory
  dense weights                                                         2.99 GiB
  KV cache of 4,096 tokens                                            512.00 MiB
  workspace (an estimate)                                             848.12 MiB
  staging slots: 2                                                    672.00 MiB
  expert slots: 57 (one pool over layers, 1.8 a layer)                 18.70 GiB
  unused                                                              329.37 MiB
  gpu_memory, all of these                                             24.00 GiB
  all 256 experts alone                                                84.00 GiB
  everything resident would need                                       88.32 GiB

Homes of the experts                                       experts          size
  pinned                                                        97     31.83 GiB
  pageable                                                      98     32.16 GiB
  disk                                                          61     20.02 GiB
  host_memory, for pinned and pageable                                 64.00 GiB
  pinned_memory, a part of it                                          32.00 GiB
  available on this machine (the defaults come from it)               128.00 GiB

Per token, if 80.0% of its 64 routed pairs hit (an assumption)
  experts loaded                                                           12.80
  over the link to the device                                           4.20 GiB
  from disk, if misses are spread evenly                                1.00 GiB
  tokens/s at most, from a link of 25 GB/s alone                            5.54
  tokens/s at most, from a disk of 3 GB/s alone                             2.79
  tokens/s at most, both overlapping                                        2.79
"""


def test_rates_have_decimals_where_they_say_something(mixtral):
    slow, fast = (plan_text(plan_memory(mixtral, link_gbps=gbps)) for gbps in (25, 25_000))
    assert "alone                            5.54\n" in slow + "\n"
    assert "alone                        5,544\n" in fast + "\n"


def test_text(mixtral, capsys):
    budgets = ("--gpu-memory", "24GiB", "--host-memory", "64GiB", "--pinned-memory", "32GiB")
    assert run(capsys, mixtral, *budgets) == TEXT
    assert run(capsys, mixtral / "config.json", *budgets) == TEXT


def test_text_without_a_budget(mixtral, capsys):
    text = run(capsys, mixtral, "--context", 10)
    assert "slots" not in text and "gpu_memory" not in text and "from disk" not in text
    assert "KV cache of 10 tokens" in text and "everything resident would need" in text


@pytest.mark.parametrize("gpu_memory", ["6GiB", "12GiB", "48GiB", "100GiB"])
def test_text_fits_80_columns(gpu_memory, mixtral, capsys):
    text = run(capsys, mixtral, "--gpu-memory", gpu_memory, "--host-memory", "200MiB")
    assert max(map(len, text.splitlines())) <= 80


def test_json_is_the_plan(mixtral, capsys):
    options = ("--context", 100, "--hit-rate", 0.5, "--link-gbps", 50, "--disk-gbps", 7)
    out = run(capsys, mixtral, "--json", "--gpu-memory", "24GiB", *options, "--dtype", "float16")
    plan = plan_memory(
        mixtral,
        gpu_memory="24GiB",
        context_tokens=100,
        hit_rate=0.5,
        link_gbps=50,
        disk_gbps=7,
        dtype="float16",
    )
    assert json.loads(out) == plan.as_dict()


def test_nothing_pinned(mixtral):
    plan = plan_memory(mixtral, pinned_memory="0", host_memory="0")
    assert plan.host.experts == {"pinned": 0, "pageable": 0, "disk": 256}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpu-memory", "2GiB"], "and one expert slot 352,321,536"),
        (["--gpu-memory", "24"], "gpu_memory needs a unit (B, kB, MB, GB, KiB, MiB, GiB, ...), as"),
        (["--gpu-memory", "0"], "gpu_memory must be >= 1 bytes, got '0'"),
        (["--context", "0"], "context_tokens must be >= 1, got 0"),
        (["--hit-rate", "1.5"], "hit_rate must be in [0, 1], got 1.5"),
        (["--hit-rate", "nan"], "hit_rate must be in [0, 1], got nan"),
        (["--link-gbps", "0"], "link_gbps must be finite and > 0, got 0.0"),
        (["--disk-gbps", "inf"], "disk_gbps must be finite and > 0, got inf"),
        (["--dtype", "int8"], "invalid choice"),
        (["--host-memory", "1GiB", "--pinned-memory", "2GiB"], "must be <= host_memory=1,073,"),
    ],
)
def test_refused_options(options, message, mixtral, capsys):
    assert message in refused(capsys, mixtral, *options)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not a valid JSON file"),
        ("{}", "model_type"),
        ('{"model_type": "gpt2"}', "has no MoE layer; known routers: Mixtral"),
        ('{"model_type": "bert"}', "BertLMHeadModel has no MoE layer"),
        ('{"model_type": "vit"}', "no model can be built from the vit config"),
        (
            json.dumps(MIXTRAL | {"num_attention_heads": 0}),
            "no model can be built from the mixtral config",
        ),
    ],
)
def test_refused_configs(text, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert message in refused(capsys, tmp_path)


def test_refused_places(tmp_path, capsys):
    assert f"{tmp_path}: the folder has no config.json" in refused(capsys, tmp_path)
    for name in (
        tmp_path / "missing",
        "./missing",
        "a/b/c",
        "missing.json",
        "../x",
        "",
        "x" * 5000 + "/a/b",
    ):
        assert f"model {name}: there is no such folder or file" in refused(capsys, name)
    assert "model no-one/nothing: " in refused(capsys, "no-one/nothing")  # offline


def test_without_transformers(mixtral, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "error: this needs transformers: pip install 'transformers>=5.17'" in refused(
        capsys, mixtral
    )


def test_code_of_a_checkpoint_is_not_run(tmp_path, capsys):
    config = {"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    assert "custom code" in refused(capsys, tmp_path)


@pytest.mark.parametrize(
    "quantization, name",
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq, 4 bits"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors, pack-quantized",
        ),
        ({}, "an unnamed format"),
    ],
)
def test_quantized_checkpoints_are_refused(quantization, name, mixtral, capsys):
    config = MIXTRAL | {"quantization_config": quantization}
    (mixtral / "config.json").write_text(json.dumps(config))
    bf16_bytes = DENSE - 2 * 64 * 4 + 256 * EXPERT  # buffers are not in checkpoints
    assert (
        f"the checkpoint is quantized ({name}), which is not supported: use the model's bfloat16 "
        f"checkpoint, whose weights take {bf16_bytes:,} bytes (87.0 GiB)"
    ) in refused(capsys, mixtral)


def test_quantized_gpt_oss_is_refused(tmp_path, capsys):
    config = {
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "quantized (mxfp4)" in refused(capsys, tmp_path)


def test_no_quantization(mixtral):
    config = AutoConfig.from_pretrained(mixtral)
    assert describe_quantization(config) is None
    config.quantization_config = None
    assert describe_quantization(config) is None
    refuse_quantized(config, 1)


def test_no_network_for_a_folder(mixtral, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert plan_memory(mixtral).model.moe_layers == 32


@pytest.mark.parametrize(
    "num_bytes, expected",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * GIB // 2, "1.50 GiB")],
)
def test_size(num_bytes, expected):
    assert size(num_bytes) == expected


def test_a_child_process():
    options = ["examples/tiny_mixtral", "--gpu-memory", "9MiB", "--context", "64", "--json"]
    child = subprocess.run(
        [sys.executable, "-m", "moe_gpu", "plan", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    plan = json.loads(child.stdout)
    assert plan["model"]["expert_bytes"] == 3 * 256 * 192 * 2
    assert plan["device"]["slots_per_layer"] == 4 and not plan["device"]["pool"]


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_who_leaves(buffered):
    """As `| head -1` does once it has its line."""
    reader, writer = os.pipe()
    os.close(reader)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, *([] if buffered else ["-u"]), "-m", "moe_gpu", "plan"]
    child = subprocess.run(
        [*command, "examples/tiny_mixtral"],
        cwd=ROOT,
        env=env,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (child.returncode, child.stderr) == (141, "")

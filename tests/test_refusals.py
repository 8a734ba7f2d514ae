"""Every refusal that concerns families, files, compiling, training and devices, as it reads.

``pytest -s tests/test_refusals.py`` prints them. Each must be a sentence that names what is at
fault and says what to do instead; that it comes before anything changed is tested where it is made.
"""

import copy
import pickle
import re

import pytest
import torch
import transformers
from transformers.core_model_loading import Transpose, WeightConverter

import moe_gpu
from checkpoints import save
from mixtral import make_model, prompt, without_interpreter  # noqa: F401 - runs by itself
from moe_gpu import MoEGate
from moe_gpu.huggingface import blocks, origins
from moe_gpu.huggingface import experts as experts_module
from zoo import COMMON, EXPERTS, HEADS, LOCAL, ZOO


def causal(config, **arguments):
    """Return a model of a family that is not in the zoo."""
    config = getattr(transformers, config)(**COMMON | arguments)
    return transformers.AutoModelForCausalLM.from_config(config)


def attach(model, **options):
    moe_gpu.attach(model, **{"slots": 4} | options)


def attached(use, **options):
    """Return a call that attaches a model, uses it, and detaches."""

    def run(tmp_path, monkeypatch):
        model = make_model()
        model.requires_grad_(True)
        with moe_gpu.attach(model, **{"slots": 4} | options):
            use(model)

    return run


def loaded(change, **options):
    """Return a call that loads a checkpoint after a change to its folder or to transformers."""

    def run(tmp_path, monkeypatch):
        change(save(make_model(), tmp_path), monkeypatch)
        moe_gpu.load(tmp_path, **{"slots": 4} | options)[1].close()

    return run


def set_quantization(**found):
    def change(folder, monkeypatch):
        config = transformers.AutoConfig.from_pretrained(folder)
        config.quantization_config = found
        config.save_pretrained(folder)

    return change


def transpose_experts(folder, monkeypatch):
    """Make transformers turn packed experts around while it loads them."""
    save(make_model(), folder, packed=True)
    name = ".experts.down_proj"
    converter = WeightConverter(name, name, operations=[Transpose(1, 2)])
    monkeypatch.setattr(origins, "get_model_conversion_mapping", lambda model: [converter])


def split(change):
    """Return a call on a model that says it is split over devices."""

    def run(tmp_path, monkeypatch):
        model = make_model()
        model.lm_head.to("meta")
        model.hf_device_map = {"": "cpu", "lm_head": "meta"}
        change(model)

    return run


def meta_router(model):
    model.model.layers[1].mlp.gate.to("meta")
    attach(model)


def captured(model):
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(experts_module, "is_capturing", lambda device: True)
        model(prompt())


def sharded(tmp_path, monkeypatch):
    model = make_model()
    model._tp_size = 2
    attach(model)


def with_gradient(tmp_path, monkeypatch):
    model = make_model()
    model(prompt(), labels=prompt()).loss.backward()
    attach(model)


def closed(tmp_path, monkeypatch):
    model, moe = moe_gpu.load(save(make_model(), tmp_path), slots=4)
    moe.close()
    model(prompt())


def old_transformers(tmp_path, monkeypatch):
    model = make_model()
    monkeypatch.setattr(blocks.transformers, "__version__", "5.9.1")
    attach(model)


def gradient_of_a_sparsemixer(tmp_path, monkeypatch):
    gate = MoEGate(num_experts=8, top_k=2, renormalize=False, score="sparsemixer")
    gate.route(torch.randn(3, 8, requires_grad=True))


def group_of_one(tmp_path, monkeypatch):
    MoEGate(num_experts=8, top_k=2, score="sigmoid", num_groups=8, top_groups=4)


FULL = {"fullgraph": True, "backend": "eager"}

# what is refused, what the message must name, what it must say to do, and how to get there
REFUSALS = {
    # families
    "unknown router": (
        "model.layers.0.feed_forward: router class Lfm2MoeTopKRouter",
        "give its router class a row in FAMILIES",
        lambda *_: attach(
            causal(
                "Lfm2MoeConfig", **EXPERTS, num_dense_layers=0,
                layer_types=["full_attention", "conv"],
            )
        ),
    ),
    "llama 4": (
        "model.layers.0.feed_forward: Llama4Router",
        "there are no routed pairs",  # nothing can be done
        lambda *_: attach(
            causal("Llama4TextConfig", **LOCAL | HEADS, intermediate_size_mlp=48, pad_token_id=0)
        ),
    ),
    "unknown setting": (
        "model.layers.0.mlp: DeepseekV2TopkRouter with topk_method='noaux_tc'",
        "is not known: 'greedy', 'group_limited_greedy' are",
        lambda *_: attach(ZOO["deepseek_v2"].make_model(topk_method="noaux_tc")),
    ),
    "old transformers": (
        "model.layers.0.mlp: MixtralTopKRouter is supported as of transformers 5.17, this is 5.9.1",
        "upgrade it",
        old_transformers,
    ),
    "experts of another kind": (
        "model.layers.0.mlp: experts MixtralExperts",
        "they must hold gate_up_proj and down_proj",
        lambda *_: attach(without_down_proj()),
    ),
    "no experts": (
        "GPT2LMHeadModel has no MoE layer",
        "known routers: MixtralTopKRouter",
        lambda *_: attach(
            transformers.GPT2LMHeadModel(
                transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)
            )
        ),
    ),
    "groups of one": ("group_score", "needs groups of at least 2 experts", group_of_one),
    # files
    "quantized": (
        "the checkpoint is quantized (gptq",
        "use the model's bfloat16 checkpoint",
        loaded(set_quantization(quant_method="gptq", bits=4)),
    ),
    "block float8": (
        "the checkpoint is quantized (fp8",
        "load(..., dequantize=True) converts this one",
        loaded(set_quantization(quant_method="fp8", weight_block_size=[16, 16])),
    ),
    "transposed in the files": (
        "model.layers.0.mlp.experts.down_proj is made of",
        "use from_pretrained and attach()",
        loaded(transpose_experts),
    ),
    "closed": ("this model was closed", "load it again", closed),
    # compiling
    "traced whole": (
        "only an attached model with every expert resident can be traced",
        "attach(..., resident=1.0), without verify",
        attached(lambda model: torch.compile(model.eval(), **FULL)(prompt())),
    ),
    "captured": (
        "captured in a CUDA graph",
        "attach(..., resident=1.0), without verify",
        attached(captured),
    ),
    # training
    "training": (
        "an attached model is for inference",
        "attach(..., resident=1.0), without verify",
        attached(lambda model: model.train()(prompt())),
    ),
    "backward": (
        "the experts of an attached model have no backward pass",
        "attach(..., resident=1.0), without verify",
        attached(lambda model: model(prompt(), labels=prompt()).loss.backward()),
    ),
    "gradients left": (
        "model.layers.0.mlp.experts.gate_up_proj holds a gradient",
        "zero_grad(set_to_none=True) first",
        with_gradient,
    ),
    "sparsemixer": (
        "a sparsemixer router",
        "call it under torch.no_grad()",
        gradient_of_a_sparsemixer,
    ),
    "state dict": (
        "an attached model cannot load a state dict",
        "detach() first, or attach(..., resident=1.0)",
        attached(lambda model: model.load_state_dict(make_model(1).state_dict())),
    ),
    "copied": ("an attached model cannot be copied", "detach() first", attached(copy.deepcopy)),
    "pickled": ("an attached model cannot be pickled", "detach() first", attached(pickle.dumps)),
    "other experts chosen": (
        "model.layers.0.mlp: the experts implementation was changed to 'eager'",
        "set it to 'moe_gpu' again, or detach()",
        attached(
            lambda model: (model.set_experts_implementation("eager"), model(prompt()))
        ),
    ),
    "converted": (
        "model.layers.0.mlp: gate_up_proj is no longer the device slots",
        "detach() first",
        attached(lambda model: model.double()(prompt())),
    ),
    # devices
    "on meta": (
        "model.layers.0.mlp.experts.gate_up_proj is on device meta",
        "load the weights first",
        lambda *_: attach(make_model().to("meta")),
    ),
    "moved while split": (
        "device='cpu'", "leave it out", split(lambda model: attach(model, device="cpu"))
    ),
    "bytes while split": (
        "gpu_memory is for a model on one device", "give slots or resident",
        split(lambda model: moe_gpu.attach(model, gpu_memory="1GiB")),
    ),
    "router elsewhere": (
        "model.layers.1.mlp: its router is on meta", "put both on one device", split(meta_router)
    ),
    "sharded": ("model is sharded over processes", "Load it without tp_plan", sharded),
}  # fmt: skip


def without_down_proj():
    model = make_model()
    del model.model.layers[0].mlp.experts.down_proj
    return model


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_reads_as_a_sentence(case, tmp_path, monkeypatch):
    names, does, provoke = REFUSALS[case]
    with pytest.raises(Exception) as refusal:
        provoke(tmp_path, monkeypatch)
    torch.compiler.reset()
    message = str(refusal.value)
    if case == "traced whole":  # inside what the compiler has to say
        assert does in message
        message = experts_module.UNTRACEABLE
    print(f"\n{case}: {type(refusal.value).__name__}: {message}")
    assert names in message and does in message
    assert len(message.split()) > 5 and "  " not in message.splitlines()[0]
    assert not re.search(r"0x[0-9a-f]{6}|<class|<[\w.]+ object|Traceback", message)
    assert message.count("(") == message.count(")")
    assert not message.splitlines()[0].endswith((".", ",", ":", " "))

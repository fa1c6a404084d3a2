"""Times LLaVA-1.5-7B in PyTorch at the shapes of ``python -m mllm_act.bench``, for comparison.

    python benchmarks/pytorch_llava.py --case=train_paper --case=act_3            # one GPU with 100 GiB
    python benchmarks/pytorch_llava.py --case=train_paper --compile
    python benchmarks/pytorch_llava.py --tiny                                     # any machine; tests that it runs

Prints one JSON line per case. The model consists of the classes in Transformers' LlavaForConditionalGeneration
(CLIPVisionModel, LlamaForCausalLM), with SDPA attention and PEFT's LoRA (rank 128, alpha 32, dropout 0.1). It has the
real shapes and random bfloat16 weights, made on the device; nothing is downloaded. Choices in favour of PyTorch:

* CLIP's last layer, whose output LLaVA does not use, is left out; features are computed without gradients.
* Logits are computed for supervised tokens only, and over the 512 action tokens only, as adapters do.
* There is no padding and no mask, so SDPA uses its fastest causal kernel. AdamW is PyTorch's fused version.

LoRA's factors, the bridge and the action tokens' embedding and head are trained. They are float32, multiplied in
bfloat16 under autocast, as in Transformers' Trainer with ``bf16=True`` (``--trained=bfloat16``: bfloat16).

| case | batch | prompt | images | decoded or supervised | LoRA |
|---|---|---|---|---|---|
| train_paper, train_calvin | 32 | 64 tokens | 3, 12, of 4 latents each (Perceiver) | 2 action tokens | q, k, v |
| train_llava576 | 16 | 64 tokens | 1 of 576 tokens (LLaVA's projector) | 2 action tokens | all 7 matrices |
| act_3, act_12 | 1 | 64 tokens | 3, 12, of 4 latents each, one of them new | 2 action tokens | merged |

A sample has one supervised action, that of the newest step: with a plain causal mask, later steps would see the action
tokens of earlier ones. Acting reuses the latents of past images, encodes the new image, prefills, and decodes greedily
with Transformers' cache.

``step_ms`` is the median over steps, by CUDA events. ``tflops`` is TFLOP/s, counted as in mllm_act/flops.py: 2
FLOP per multiply-add; forward and input gradient for a frozen matrix (twice forward), and the weight gradient for a
trained one (3 times); attention's two products of all queries with all keys, 3 times forward in training; the vision
encoder's forward only. Element-wise operations and the embedding look-up are not counted.
"""

import argparse
import dataclasses
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

ACTION_TOKENS = 512
QKV = ("q_proj", "k_proj", "v_proj")
ALL = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Case:
    """The shapes of a case; ``lora`` names the adapted matrices (none: the case acts)."""

    batch: int
    images: int
    bridge: str
    lora: tuple[str, ...] = ()
    prompt: int = 64
    decoded: int = 2


CASES = {
    "act_3": Case(1, 3, "perceiver"),
    "act_12": Case(1, 12, "perceiver"),
    "train_paper": Case(32, 3, "perceiver", QKV),
    "train_calvin": Case(32, 12, "perceiver", QKV),
    "train_llava576": Case(16, 1, "projector", ALL),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """LLaVA-1.5-7B's sizes, and the Perceiver's."""

    image: int = 336
    patch: int = 14
    vision_width: int = 1024
    vision_layers: int = 23
    vision_heads: int = 16
    width: int = 4096
    layers: int = 32
    heads: int = 32
    mlp_width: int = 11008
    vocabulary: int = 32000
    latents: int = 4
    rank: int = 128

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


TINY = Sizes(
    image=28, patch=14, vision_width=32, vision_layers=2, vision_heads=2, width=64, layers=2, heads=2, mlp_width=96,
    vocabulary=128, rank=4,
)  # fmt: skip


class PerceiverLayer(nn.Module):
    """Latents attend to features and to each other, then an MLP; see mllm_act/models/bridge/perceiver.py."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_features, self.norm_latents, self.norm_mlp = (
            nn.LayerNorm(width) for _ in range(3)
        )
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        query = self.norm_latents(latents)
        source = torch.cat([self.norm_features(features), query], dim=1)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.q(query), self.k(source), self.v(source))
        )
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        latents = latents + self.o(attended)
        hidden = functional.gelu(self.up(self.norm_mlp(latents)), approximate="tanh")
        return latents + self.down(hidden)


class Perceiver(nn.Module):
    """Maps the features [B, N, F] of an image to 4 embeddings [B, 4, D], in two layers."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.vision_width
        self.latents = nn.Parameter(torch.randn(sizes.latents, width))
        self.blocks = nn.ModuleList(PerceiverLayer(width, sizes.vision_heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, sizes.width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        x = self.latents.to(features.dtype).expand(len(features), -1, -1)
        for block in self.blocks:
            x = block(x, features)
        return self.output(self.norm(x))


class Policy(nn.Module):
    """Vision encoder, bridge, language model, and the action tokens' embedding and head."""

    def __init__(
        self, vision: nn.Module, language: LlamaForCausalLM, bridge: str, sizes: Sizes
    ) -> None:
        super().__init__()
        self.vision, self.language = vision, language
        if bridge == "perceiver":
            self.bridge: nn.Module = Perceiver(sizes)
        else:
            first = nn.Linear(sizes.vision_width, sizes.width)
            self.bridge = nn.Sequential(first, nn.GELU(), nn.Linear(sizes.width, sizes.width))
        self.embedding = nn.Embedding(ACTION_TOKENS, sizes.width)
        self.head = nn.Linear(sizes.width, ACTION_TOKENS, bias=False)

    def encode(self, images: Tensor) -> Tensor:
        """Returns the latents [B, T * L, D] of images [B, T, 3, H, W]."""
        with torch.no_grad():
            features = self.vision(images.flatten(0, 1)).last_hidden_state[:, 1:]
        return self.bridge(features).reshape(len(images), -1, self.language.config.hidden_size)

    def forward(self, prompt: Tensor, images: Tensor, tokens: Tensor) -> Tensor:
        """Returns the mean cross-entropy of the newest step's action tokens [B, M]."""
        parts = [
            self.language.model.embed_tokens(prompt),
            self.encode(images),
            self.embedding(tokens[:, :-1]),
        ]
        x = torch.cat([part.to(parts[0].dtype) for part in parts], dim=1)
        hidden = self.language.model(inputs_embeds=x, use_cache=False).last_hidden_state
        logits = self.head(hidden[:, -tokens.shape[1] :])
        return functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    def act(self, prompt: Tensor, image: Tensor, past: Tensor, steps: int) -> Tensor:
        """Decodes action tokens [B, steps] greedily; ``past`` are the latents of earlier images."""
        x = torch.cat([self.language.model.embed_tokens(prompt), past, self.encode(image)], dim=1)
        tokens, cache = [], None
        for _ in range(steps):
            out = self.language.model(inputs_embeds=x, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            tokens.append(self.head(out.last_hidden_state[:, -1:]).argmax(-1))
            x = self.embedding(tokens[-1])
        return torch.cat(tokens, dim=1)


def build(sizes: Sizes, device: str) -> tuple[nn.Module, LlamaForCausalLM]:
    """Makes vision encoder and language model with random bfloat16 weights on the device."""
    clip = CLIPVisionConfig(
        image_size=sizes.image, patch_size=sizes.patch, hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width, num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads, attn_implementation="sdpa",
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.width, intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads,
        rms_norm_eps=1e-5, attn_implementation="sdpa",
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            vision, language = CLIPVisionModel(clip), LlamaForCausalLM(llama)
    finally:
        torch.set_default_dtype(default)
    for model in (vision, language):
        model.eval().requires_grad_(False)
    return vision, language


def flop(case: Case, sizes: Sizes) -> float:
    """Returns the FLOP of one step; see the module's docstring."""
    d, f, v, p = sizes.width, sizes.mlp_width, sizes.vision_width, sizes.patches
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (d, d))
    shapes |= {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
    matrices = sizes.layers * sum(i * o for i, o in shapes.values())
    factors = sizes.layers * sum(sizes.rank * sum(shapes[name]) for name in case.lora)
    each = sizes.latents if case.bridge == "perceiver" else p
    tokens = case.prompt + case.images * each + case.decoded - 1
    new = case.images if case.lora else 1
    block = 12 * v * v * (p + 1) + 2 * (p + 1) ** 2 * v
    vision = new * (sizes.vision_layers * block + 3 * sizes.patch**2 * v * p)
    if case.bridge == "perceiver":
        inner = 2 * v * v * (p + each) + (2 + 8) * v * v * each + 2 * each * (p + each) * v
        bridge = new * (2 * inner + v * d * each)
    else:
        bridge = new * (v * d + d * d) * p
    attention = sizes.layers * 2 * tokens**2 * d
    head = case.decoded * d * ACTION_TOKENS
    if case.lora:
        training = 2 * matrices * tokens + 3 * (factors * tokens + attention + bridge + head)
        return 2.0 * case.batch * (training + vision)
    return 2.0 * case.batch * (matrices * tokens + attention + bridge + head + vision)


def inputs(case: Case, sizes: Sizes, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns random prompt tokens, images and action tokens."""
    shape = (case.batch, case.images if case.lora else 1, 3, sizes.image, sizes.image)
    images = torch.randn(shape, device=device, dtype=torch.bfloat16)
    prompt = torch.randint(sizes.vocabulary, (case.batch, case.prompt), device=device)
    tokens = torch.randint(ACTION_TOKENS, (case.batch, case.decoded), device=device)
    return prompt, images, tokens


def train_step(policy: Policy, case: Case, sizes: Sizes, device: str, compiled: bool) -> Callable:
    """Returns a function that makes one update."""
    prompt, images, tokens = inputs(case, sizes, device)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.01, fused=device == "cuda")
    policy.train()
    policy.vision.eval()
    loss_of = torch.compile(policy, dynamic=False) if compiled else policy

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(prompt, images, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def act_step(policy: Policy, case: Case, sizes: Sizes, device: str, compiled: bool) -> Callable:
    """Returns a function that decides one action."""
    prompt, image, _ = inputs(case, sizes, device)
    policy.eval().to(torch.bfloat16)
    kept = sizes.latents * (case.images - 1)
    past = torch.randn(case.batch, kept, sizes.width, device=device, dtype=torch.bfloat16)
    decide = torch.compile(policy.act, mode="reduce-overhead") if compiled else policy.act

    def step() -> Tensor:
        with torch.no_grad():
            return decide(prompt, image, past, case.decoded)

    return step


def measure(step: Callable[[], Tensor], warmup: int, steps: int, device: str) -> float:
    """Returns the median milliseconds of a step."""
    for _ in range(warmup):
        result = step()
    if device != "cuda":
        times = []
        for _ in range(steps):
            before = time.perf_counter()
            result = step()
            times.append(1e3 * (time.perf_counter() - before))
    else:
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            result = step()
            event.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    assert torch.isfinite(result.float()).all(), "the loss is not finite"
    return statistics.median(times)


def run_case(
    name: str, vision: nn.Module, language: LlamaForCausalLM, sizes: Sizes, device: str, args: Any
) -> dict[str, Any]:
    """Times one case and returns its figures."""
    case = CASES[name]
    trained_dtype = getattr(torch, args.trained)
    adapted = None
    with torch.device(device):
        if case.lora:  # puts the factors into the language model's layers
            settings = peft.LoraConfig(
                r=sizes.rank, lora_alpha=32, lora_dropout=0.1, target_modules=list(case.lora)
            )
            adapted = peft.get_peft_model(language, settings)
        policy = Policy(vision, language, case.bridge, sizes)
    for path, parameter in policy.named_parameters():
        trained = "lora_" in path or not path.startswith(("vision.", "language."))
        parameter.requires_grad_(trained and bool(case.lora))
        if trained:
            parameter.data = parameter.data.to(trained_dtype)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    make = train_step if case.lora else act_step
    ms = measure(make(policy, case, sizes, device, args.compile), args.warmup, args.steps, device)
    gpu = device == "cuda"
    line = {
        "case": name, "program": "pytorch", "compile": args.compile,
        "trained_in": args.trained if case.lora else None,
        "trained_parameters": sum(p.numel() for p in policy.parameters() if p.requires_grad),
        "step_ms": round(ms, 3), "samples_per_s": round(1e3 * case.batch / ms, 2),
        "supervised_actions_per_s": round(1e3 * case.batch / ms, 2) if case.lora else None,
        "tflops": round(flop(case, sizes) / ms * 1e-9, 2),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None,
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "cpu",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "tiny": args.tiny,
    }  # fmt: skip
    if adapted is not None:
        adapted.unload()  # restores the language model
    return line


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", choices=list(CASES), help="repeatable (default: all)")
    add("--compile", action="store_true", help="torch.compile the step")
    add("--steps", type=int, default=10, help="timed steps (default: 10)")
    add("--warmup", type=int, default=3, help="untimed steps before them (default: 3)")
    add(
        "--trained",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the trained parameters (default: float32)",
    )
    add("--tiny", action="store_true", help="small sizes, to test that it runs")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = TINY if args.tiny else Sizes()
    torch.manual_seed(0)
    vision, language = build(sizes, device)
    for name in args.case or CASES:
        print(json.dumps(run_case(name, vision, language, sizes, device, args)), flush=True)
        gc.collect()  # frees the previous case's optimizer and activations
        torch.compiler.reset()


if __name__ == "__main__":
    main()

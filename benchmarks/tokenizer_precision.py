"""Tokenizer precision and speed, side by side with vector-quantize-pytorch's ResidualVQ.

    python benchmarks/tokenizer_precision.py                    # `make parity` first
    python benchmarks/tokenizer_precision.py --seeds=0,1,2 --tuned

On 2 cores: 7 minutes per seed. Generating the actions takes 2 more minutes, once (kept in the temporary folder).

Both train the paper's autoencoder (arXiv 2406.07904) on the same actions in the same order: scripted experts of ML-45,
16 configurations of each task for training and the 10 test configurations for the error. Both make 400 updates of 512
actions in one process on the same cores, in alternating blocks of 20 updates.

The reference has the settings that its README recommends (k-means initialisation on the first batch, replacement of
codes with a moving-average use below 2, rotation trick), PyTorch's fused AdamW, and our warm-up and cosine schedule.
Its learning rate is the best of 1e-4, 3e-4, 1e-3 and 2e-3 on 4 further training configurations of each task; ours was
chosen on the same ones. ``--tuned`` adds the reference with the settings that our search found best for it: threshold
0.1 and decay 0.95.
"""

import argparse
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
from flax import nnx
from ml_collections.config_dict import ConfigDict
from tqdm import tqdm
from vector_quantize_pytorch import ResidualVQ

from mllm_act import envs
from mllm_act.action_tokenizer import training
from mllm_act.action_tokenizer.autoencoder import ActionTokenizer, TokenizerConfig
from mllm_act.config import load_config
from mllm_act.envs.base import Job
from mllm_act.envs.workers import EnvPool
from mllm_act.files import whole_file
from mllm_act.training import optimizer

BATCH, UPDATES, BLOCK = 512, 400, 20
TRAIN, TEST = range(16), envs.splits("metaworld")["test"]
NOISE = 0.1  # standard deviation, added to executed actions as in the demonstrations
CACHE = Path(tempfile.gettempdir()) / "mllm_act_ml45_expert_actions.npz"
REFERENCE_RATE = {1: 1e-4, 2: 3e-4}  # by number of codebooks; see the docstring


def expert_actions() -> dict[str, np.ndarray]:
    """Returns the actions of successful episodes by split, ``train`` or ``test``: float32[n, 4]."""
    if CACHE.exists():
        return dict(np.load(CACHE))
    jobs = [
        Job(task, c, 0) for task in envs.select_tasks("metaworld", "ml45") for c in (*TRAIN, *TEST)
    ]
    episodes: list[list[np.ndarray]] = [[] for _ in jobs]
    success = [False] * len(jobs)
    noise = [np.random.default_rng([0, index]) for index in range(len(jobs))]
    with EnvPool("metaworld", num_envs=30, num_workers=os.cpu_count() or 1, render=False) as pool:
        waiting, playing = list(range(len(jobs)))[::-1], dict[int, int]()
        bar = tqdm(total=len(jobs), desc="expert actions", unit="episode")
        while waiting or playing:
            free = [s for s in range(pool.num_envs) if s not in playing][: len(waiting)]
            if free:
                started = {slot: waiting.pop() for slot in free}
                pool.reset(free, [jobs[index] for index in started.values()])
                playing |= started
            slots = sorted(playing)
            actions = pool.expert_actions(slots)
            noisy = [
                a + noise[playing[s]].normal(0, NOISE, 4)
                for s, a in zip(slots, actions, strict=True)
            ]
            _, _, done = pool.step(np.array(noisy, np.float32), slots)
            for slot, action, succeeded in zip(slots, actions, done, strict=True):
                index = playing[slot]
                episodes[index].append(action)
                if succeeded or len(episodes[index]) == pool.spec.horizon:
                    success[index] = bool(succeeded)
                    del playing[slot]
                    bar.update()
        bar.close()
    split = {}
    for name, configurations in (("train", TRAIN), ("test", TEST)):
        kept = [
            e
            for e, j, s in zip(episodes, jobs, success, strict=True)
            if s and j.configuration in configurations
        ]
        split[name] = np.concatenate([np.stack(e) for e in kept]).astype(np.float32)
    with whole_file(CACHE) as partial:
        np.savez(partial, **split)
    return split


class Ours:
    """mllm_act's tokenizer with its shipped config."""

    def __init__(self, actions: np.ndarray, quantizers: int, seed: int) -> None:
        config: ConfigDict = load_config(
            f"configs/tokenizer/metaworld.py:{'rvq' if quantizers > 1 else 'vq'}"
        )
        tx, _ = optimizer.build(config.optimizer, UPDATES)
        settings = training.TrainingConfig(batch_size=BATCH, seed=seed, **config.quantizer)
        sizes = {**config.tokenizer, "quantizers": quantizers}
        self.model = ActionTokenizer(TokenizerConfig(4, **sizes), rngs=nnx.Rngs(seed))
        self.state = training.initial_state(self.model, actions, tx, settings)
        self.update = training.make_update(self.model, tx, settings)
        shape = jax.ShapeDtypeStruct((BLOCK, BATCH, 4), np.float32)
        self.update = self.update.lower(self.state, shape).compile()  # type: ignore[attr-defined]

    def train(self, batches: np.ndarray) -> None:
        self.state, metrics = self.update(self.state, batches)
        jax.block_until_ready((self.state, metrics))

    def error(self, actions: np.ndarray) -> float:
        training.store(self.state, self.model)
        return float(np.mean((training.reconstruct(self.model, actions)[0] - actions) ** 2))


class Reference:
    """The same encoder and decoder in PyTorch, with ResidualVQ between them."""

    def __init__(self, quantizers: int, seed: int, rate: float, **settings: float) -> None:
        torch.manual_seed(seed)
        self.encoder = _mlp((4, 2048, 2048, 2048, 512))
        self.decoder = _mlp((512, 2048, 2048, 2048, 4))
        self.quantizer = ResidualVQ(
            dim=512, num_quantizers=quantizers, codebook_size=512, kmeans_init=True, **settings
        )
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4, fused=True)
        warmup = round(0.05 * UPDATES)

        def schedule(step: int) -> float:
            rest = max(0, step - warmup) / (UPDATES - warmup)
            return min(1.0, step / warmup) * 0.5 * (1 + math.cos(math.pi * rest))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)

    def train(self, batches: np.ndarray) -> None:
        for batch in torch.from_numpy(batches):
            quantized, _, commitment = self.quantizer(self.encoder(batch))
            loss = torch.nn.functional.mse_loss(self.decoder(quantized), batch) + commitment.sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()

    @torch.no_grad()
    def error(self, actions: np.ndarray) -> float:
        self.quantizer.eval()
        decoded = [
            self.decoder(self.quantizer(self.encoder(part))[0]).numpy()
            for part in torch.from_numpy(actions).split(4096)
        ]
        return float(np.mean((np.concatenate(decoded) - actions) ** 2))


def _mlp(sizes: tuple[int, ...]) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--tuned", action="store_true", help="add the reference as tuned by us")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    data = expert_actions()
    train, test = data["train"], data["test"]
    print(
        f"{len(train)} actions for training, {len(test)} unseen, variance {test.var(0).mean():.2f} "
        f"per dimension; {UPDATES} updates of {BATCH} on {os.cpu_count()} cores"
    )
    for quantizers in (1, 2):
        errors: dict[str, list[float]] = {}
        walls: dict[str, list[float]] = {}
        cpus: dict[str, list[float]] = {}
        for seed in map(int, args.seeds.split(",")):
            rate = REFERENCE_RATE[quantizers]
            makers: dict[str, Callable[[], Ours | Reference]] = {
                "ours": lambda s=seed, q=quantizers: Ours(train, q, s),
                "reference": lambda s=seed, q=quantizers, r=rate: Reference(
                    q, s, r, threshold_ema_dead_code=2
                ),
            }
            if args.tuned:
                makers["reference, tuned by us"] = lambda s=seed, q=quantizers: Reference(
                    q, s, 3e-4, threshold_ema_dead_code=0.1, decay=0.95
                )
            learners: dict[str, Ours | Reference] = {}
            for name, make in makers.items():
                start = time.perf_counter()
                learners[name] = make()
                print(f"  {name}: set up in {time.perf_counter() - start:.1f} s")
            for first in tqdm(range(0, UPDATES, BLOCK), desc=f"Q={quantizers} seed={seed}"):
                index = training.batch_indices(len(train), BATCH, first, BLOCK, seed)
                for name, learner in learners.items():
                    wall, cpu = time.perf_counter(), time.process_time()
                    learner.train(train[index])
                    if first:  # the first block includes the reference's k-means and warm-up
                        walls.setdefault(name, []).append((time.perf_counter() - wall) / BLOCK)
                        cpus.setdefault(name, []).append((time.process_time() - cpu) / BLOCK)
            for name, learner in learners.items():
                errors.setdefault(name, []).append(learner.error(test))
        print(f"Q = {quantizers}:")
        for name, values in errors.items():
            ratio = np.median(np.array(walls["reference"]) / np.array(walls[name]))
            low, high = min(values), max(values)
            print(
                f"  {name:<24} MSE on unseen {np.mean(values):.5f} ({low:.5f} to {high:.5f})  "
                f"update {1e3 * np.median(walls[name]):.0f} ms (CPU {1e3 * np.median(cpus[name]):.0f})"
                f"  {ratio:.2f} times the reference's speed (median over blocks)"
            )


if __name__ == "__main__":
    main()

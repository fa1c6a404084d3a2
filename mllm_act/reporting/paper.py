"""Success rates of arXiv 2406.07904, in percent, to put beside ours: tables 6 (BabyAI) and 7 (Meta-World, ten episodes
for each task). The paper's model is LLaVA-1.5-7B, trained on all tasks.
"""

_ADAPTERS = ("rvq", "regression", "vq", "uniform")
_METAWORLD = """
assembly 100 70 10 60
basketball 90 70 60 100
button-press-topdown 100 90 40 100
button-press-topdown-wall 100 100 60 90
button-press 100 100 70 100
button-press-wall 100 100 100 100
coffee-button 100 100 100 100
coffee-pull 100 40 30 50
coffee-push 80 20 30 80
dial-turn 100 50 40 100
disassemble 60 30 30 50
door-close 100 100 100 100
door-open 100 100 100 100
drawer-close 100 100 100 100
drawer-open 100 100 60 100
faucet-open 100 100 100 100
faucet-close 100 90 100 60
hammer 100 40 50 20
handle-press-side 100 100 100 100
handle-press 100 100 90 100
handle-pull-side 40 10 10 10
handle-pull 70 20 50 30
lever-pull 60 40 50 40
peg-insert-side 60 70 0 40
peg-unplug-side 50 30 100 90
pick-out-of-hole 50 90 40 30
pick-place 80 20 40 60
pick-place-wall 80 20 40 30
plate-slide 100 60 40 100
plate-slide-side 100 100 100 90
plate-slide-back 100 90 10 100
plate-slide-back-side 100 20 100 100
push-back 50 30 20 20
push 60 20 70 90
push-wall 80 40 60 100
reach 30 20 10 70
reach-wall 80 80 80 70
shelf-place 50 20 10 10
soccer 40 0 60 40
stick-push 100 60 10 100
stick-pull 90 50 30 100
sweep-into 70 40 60 70
sweep 90 30 50 70
window-open 100 100 100 100
window-close 100 100 100 100
"""
_BABYAI = """
goto 90 90 75
pickup 60 35 35
open 26 7 21
putnext 8 5 7
pickup-goto 21 12 22
"""


def _read(table: str, adapters: tuple[str, ...]) -> dict[str, dict[str, float]]:
    rows = [line.split() for line in table.strip().splitlines()]
    return {
        adapter: {task: float(numbers[i]) for task, *numbers in rows}
        for i, adapter in enumerate(adapters)
    }


# environment -> adapter -> task (without a version) -> percent
PAPER = {
    "metaworld": _read(_METAWORLD, _ADAPTERS),
    "babyai": _read(_BABYAI, ("semlang", "lang", "categorical")),
}


def paper_success(env: str, adapter: str, task: str) -> float | None:
    """Returns the paper's success rate in percent, or None where it has none."""
    return PAPER.get(env, {}).get(adapter, {}).get(task.removesuffix("-v3"))

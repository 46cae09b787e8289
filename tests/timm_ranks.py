"""What `test_timm_ranks.py` starts under torchrun: command lines one after the other, and what each rank has then."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from ast_plugin.integrations.timm import launcher, train
from ast_plugin.integrations.timm.networks import network_in
from ast_plugin.integrations.timm.run import TimmRun


def digest(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """Return figures that differ where tensors do, each as text would keep it."""
    return {name: [float(t.double().sum()), float(t.double().square().sum())] for name, t in sorted(tensors.items())}


def held(run: TimmRun) -> dict[str, dict[str, list[float]]]:
    """Return what a rank holds: dense weights, masks, private BatchNorm, and that of the average."""
    assert run.ast is not None
    ast, found = run.ast, {}
    found["weights"] = digest({name: p.detach() for name, p in network_in(ast.model).named_parameters()})
    for name in ast.sub_nets:
        found[f"masks {name}"] = digest({key: mask.double() for key, mask in ast.masks.of(name).items()})
        found[f"private {name}"] = digest(ast.private_state(name))
        if run._average is not None:
            found[f"average {name}"] = digest(run._average.twin.private_state(name))
    return found


def main(folder: Path) -> None:
    """Run the command lines of ``folder/runs.json``; a rank's findings go to ``rank0.json`` and so on."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    finish, found = TimmRun.finish, []

    def finished(run: TimmRun) -> list[Path]:
        found.append(held(run))
        return finish(run)

    TimmRun.finish = finished  # type: ignore[method-assign]
    codes = []
    for script, arguments, port in json.loads((folder / "runs.json").read_text()):
        # A second process group in one process wants a store without the keys of the first.
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
        codes.append(launcher.main([script, *arguments]) if script else train.main(arguments))
    (folder / f"rank{rank}.json").write_text(json.dumps({"codes": codes, "runs": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

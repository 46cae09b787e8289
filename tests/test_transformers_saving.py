"""The files beside a saved model: dense by stock loading, sub-nets by ours, one of them by stock loading again."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers_saved import MODELS, STEPS, SUB_NETS, Saved, SavedModels, gpt2, logits, saved, train

import ast_plugin
from ast_plugin.cli import main
from ast_plugin.elastic_file import ELASTIC, read_elastic
from ast_plugin.errors import ConfigError, ElasticFileError, SaveError
from ast_plugin.export_folder import export_folder
from ast_plugin.integrations.sub_net_files import CONFIG
from ast_plugin.integrations.transformers.saving import export_pretrained, save_sub_nets
from ast_plugin.version import __version__

pytestmark = pytest.mark.extra("hf")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SavedModels:
    return SavedModels(tmp_path_factory.mktemp("saved"))


@pytest.fixture(params=MODELS)
def one(request: pytest.FixtureRequest, models: SavedModels) -> Saved:
    """A saved model: a decoder with tied head, an encoder with tied head, a vision transformer, one with BatchNorm."""
    return models.of(request.param)


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return values


# ----------------------------------------------------------------------------------------------- round trips


def test_stock_loading_gives_the_dense_model(one: Saved) -> None:
    model = one.stock()
    assert list(model.state_dict()) == list(one.dense)
    assert all(torch.equal(tensor, one.dense[key]) for key, tensor in model.state_dict().items())


def test_the_folder_gives_every_sub_net_on_the_loaded_model(one: Saved) -> None:
    elastic = ast_plugin.load(one.folder, one.stock())
    assert elastic.sub_nets == SUB_NETS
    for name in SUB_NETS:
        elastic.switch(name)
        assert torch.equal(logits(elastic.model, one.kind), one.logits[name])
    assert not torch.equal(one.logits["s50"], one.logits["s80"])


def test_an_exported_folder_loads_without_this_package_and_computes_the_same(one: Saved, tmp_path: Path) -> None:
    for name in SUB_NETS:
        assert main(["export", str(one.folder), "--sub-net", name, "--to", str(tmp_path / name)]) == 0
        model = one.stock(tmp_path / name)
        assert torch.equal(logits(model, one.kind), one.logits[name])
        assert not (tmp_path / name / ELASTIC).exists()
        assert not (tmp_path / name / CONFIG).exists()


def test_export_pretrained_gives_what_the_command_gives(one: Saved, tmp_path: Path) -> None:
    export_folder(one.folder, "s80", tmp_path / "command")
    sources = {
        "controller": one.ast,
        "elastic": ast_plugin.load(one.folder, one.fresh()),
        "file": read_elastic(one.folder),
    }
    for number, (source, model) in enumerate(zip(sources.values(), (one.ast.model, None, one.fresh()), strict=True)):
        folder = tmp_path / str(number)
        export_pretrained(source, "s80", source.model if model is None else model, folder)  # type: ignore[union-attr]
        state = one.stock(folder).state_dict()
        assert all(torch.equal(t, state[key]) for key, t in one.stock(tmp_path / "command").state_dict().items())
        with (
            safe_open(folder / "model.safetensors", "pt") as ours,
            safe_open(tmp_path / "command" / "model.safetensors", "pt") as theirs,
        ):
            assert (ours.metadata(), list(ours.keys())) == (theirs.metadata(), list(theirs.keys()))
    assert torch.equal(logits(one.stock(tmp_path / "0"), one.kind), one.logits["s80"])


@pytest.mark.parametrize("kind", ["gpt2", "resnet"])
def test_a_model_saved_in_shards_is_exported_in_the_same_shards(kind: str, tmp_path: Path) -> None:
    one = saved(kind, tmp_path / "saved", max_shard_size="6KB")
    done = export_folder(one.folder, "s80", tmp_path / "out")
    assert len(done.weights) > 3
    assert done.weights == tuple(sorted(path.name for path in one.folder.glob("model-*.safetensors")))
    assert torch.equal(logits(one.stock(tmp_path / "out"), kind), one.logits["s80"])


def test_a_dense_model_saved_as_bfloat16_gives_bfloat16(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("gpt2")
    copy.deepcopy(one.ast.model).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    shutil.copy(one.folder / ELASTIC, tmp_path / "half")
    export_folder(tmp_path / "half", "s80", tmp_path / "out")
    found = one.stock(tmp_path / "out", dtype="auto")
    assert found.dtype == torch.bfloat16
    expected = ast_plugin.load(one.folder, one.fresh())
    expected.switch("s80")
    for key, tensor in expected.model.to(torch.bfloat16).state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key


def test_sub_nets_are_gathered_from_a_checkpoint_like_folder(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("bert")
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(one.folder, folder)
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
        "ast_state.pt",
    ):
        (folder / name).write_bytes(b"x")
    export_folder(folder, "s50", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        {"README.md", *(path.name for path in one.folder.iterdir())} - {ELASTIC, CONFIG}
    )
    with pytest.raises(ElasticFileError, match="one of the folders in it that have one: checkpoint-6"):
        ast_plugin.load(tmp_path, one.fresh())


def test_the_base_of_a_model_has_the_same_weights_under_other_names(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("gpt2")
    one.ast.model.base_model.save_pretrained(tmp_path / "base")
    shutil.copy(one.folder / ELASTIC, tmp_path / "base")
    export_folder(tmp_path / "base", "s80", tmp_path / "out")
    found = type(one.ast.model.base_model).from_pretrained(tmp_path / "out").state_dict()
    whole = read_elastic(one.folder).materialize("s80")
    assert all(torch.equal(tensor, whole[f"transformer.{key}"]) for key, tensor in found.items())


def test_the_base_of_a_model_with_a_head_of_its_own_is_not_all_of_it(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("vit")
    one.ast.model.base_model.save_pretrained(tmp_path / "base")
    shutil.copy(one.folder / ELASTIC, tmp_path / "base")
    with pytest.raises(ElasticFileError, match=r"the saved model lacks classifier\.weight, .*export_pretrained\("):
        export_folder(tmp_path / "base", "s80", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.slow
def test_exported_weights_load_where_this_package_is_not_installed(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("resnet")
    export_folder(one.folder, "s80", tmp_path / "out")
    script = (
        "import sys; sys.modules['ast_plugin'] = None\n"
        "import torch; from transformers import AutoModelForImageClassification\n"
        f"model = AutoModelForImageClassification.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(sum(int((p == 0).sum()) for n, p in model.named_parameters() if p.dim() > 1))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    masks = one.ast.masks
    assert int(done.stdout) == masks.total() - masks.kept("s80")


# -------------------------------------------------------------------------------------------- save_sub_nets


def test_the_summary_says_what_was_trained(models: SavedModels) -> None:
    one = models.of("bert")
    values = summary(one.folder)
    assert (values["format"], values["version"]) == ("ast_plugin.config", 1)
    assert values["model"] == "BertForMaskedLM"
    assert values["default_sub_net"] == "s50"
    assert values["step"] == STEPS
    assert values["config"] == json.loads(json.dumps(one.ast.config.to_dict()))
    assert values["files"] == [ELASTIC]
    assert values["versions"]["ast-plugin"] == __version__
    assert values["versions"]["torch"] == torch.__version__
    assert set(values["versions"]) == {"ast-plugin", "torch", "transformers"}
    masks = one.ast.masks
    assert values["sub_nets"] == [
        {
            "name": name,
            "target_sparsity": target,
            "sparsity": masks.sparsity(name),
            "kept": masks.kept(name),
            "total": masks.total(),
            "pattern": "unstructured",
            "metrics": {"loss": loss},
        }
        for name, target, loss in (("s50", 0.5, 1.5), ("s80", 0.8, 2.5))
    ]


def test_the_elastic_file_carries_metrics_and_a_report(models: SavedModels) -> None:
    contents = read_elastic(models.of("vit").folder)
    assert contents.metrics == {"s50": {"loss": 1.5}, "s80": {"loss": 2.5}}
    report = ast_plugin.Report.from_elastic(contents)
    assert report.title == "Sub-nets of ViTForImageClassification"
    assert report.steps == STEPS


def test_files_are_named_and_made_in_a_new_folder(tmp_path: Path) -> None:
    ast = train("vit")
    folder = tmp_path / "new" / "one"
    assert save_sub_nets(ast, str(folder)) == [folder / ELASTIC, folder / CONFIG]
    ast.add_report_metric("loss", math.nan, sub_net="s80")
    save_sub_nets(ast, folder)
    assert summary(folder)["sub_nets"][1]["metrics"] == {"loss": {"$float": "nan"}}


def test_without_the_elastic_file_an_older_one_does_not_stay_beside_other_weights(tmp_path: Path) -> None:
    ast = train("vit")
    save_sub_nets(ast, tmp_path)
    assert save_sub_nets(ast, tmp_path, elastic=False) == [tmp_path / CONFIG]
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]
    assert summary(tmp_path)["files"] == []


def test_sub_nets_on_their_way_are_saved_with_a_warning(tmp_path: Path) -> None:
    ast = train("vit", steps=1, initial_sparsity=0.0)
    with pytest.warns(UserWarning, match="is saved with sparsity 0") as caught:
        save_sub_nets(ast, tmp_path)
    for warning, name, target in zip(caught, SUB_NETS, ("0.500", "0.800"), strict=True):
        assert f"sub-net {name!r} is saved with sparsity 0." in str(warning.message)
        assert f"its target is {target}, which the masks reach at step 3 (now 1)" in str(warning.message)
    assert [net["target_sparsity"] for net in summary(tmp_path)["sub_nets"]] == [0.5, 0.8]
    assert all(net["sparsity"] < net["target_sparsity"] - 0.1 for net in summary(tmp_path)["sub_nets"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_sub_nets(ast, tmp_path, elastic=False)  # nothing to be warned of


def test_saving_inside_a_block_writes_the_same(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("resnet")
    with one.ast.sub_net("s80"):
        save_sub_nets(one.ast, tmp_path)
    assert (tmp_path / ELASTIC).read_bytes() == (one.folder / ELASTIC).read_bytes()


def test_saving_after_detach_writes_the_same(tmp_path: Path) -> None:
    one = saved("resnet", tmp_path / "before")
    one.ast.detach()
    save_sub_nets(one.ast, tmp_path / "after")
    for file in (ELASTIC, CONFIG):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()


def test_what_is_no_controller_and_no_folder_is_refused(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("gpt2")
    with pytest.raises(ConfigError, match="ast must be the controller of a run, got NoneType"):
        save_sub_nets(None, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="path must be the path of a file"):
        save_sub_nets(one.ast, None)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    for elastic in (True, False):
        with pytest.raises(SaveError, match="a part of the path is a file"):
            save_sub_nets(one.ast, tmp_path / "file", elastic=elastic)


# ---------------------------------------------------------------------------------------- export_pretrained


class Processor:
    """Anything that saves itself serves: a tokenizer, an image processor."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "processor.json").write_text("{}")


def test_generation_settings_type_and_processor_come_along(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("gpt2")
    model = copy.deepcopy(one.ast.model).to(torch.bfloat16)
    model.generation_config = GenerationConfig(max_new_tokens=7, bos_token_id=1, eos_token_id=2)
    export_pretrained(one.ast, "s80", model, tmp_path / "out", processing_class=Processor())
    found = one.stock(tmp_path / "out", dtype="auto")
    assert found.generation_config.max_new_tokens == 7
    assert found.dtype == torch.bfloat16
    assert found.lm_head.weight is found.transformer.wte.weight
    assert (tmp_path / "out" / "processor.json").exists()
    assert model.training == one.ast.model.training


def test_the_model_given_is_left_as_it_is(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("resnet")
    export_pretrained(one.ast, "s80", one.ast.model, tmp_path / "out")
    state = one.ast.model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in one.dense.items())


@pytest.mark.slow
def test_wrappers_are_left_out_of_what_is_saved(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("gpt2")
    compiled = torch.compile(one.fresh(), backend="eager")
    parallel = nn.DataParallel(one.fresh())
    for number, wrapped in enumerate((compiled, parallel)):
        export_pretrained(one.ast, "s80", wrapped, tmp_path / str(number))  # type: ignore[arg-type]
        assert torch.equal(logits(one.stock(tmp_path / str(number)), "gpt2"), one.logits["s80"])


def test_a_folder_of_all_sub_nets_is_not_overwritten_by_one(models: SavedModels) -> None:
    one = models.of("vit")
    before = (one.folder / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"holds elastic\.safetensors and so the weights of all sub-nets"):
        export_pretrained(one.ast, "s80", one.ast.model, one.folder)
    assert (one.folder / "model.safetensors").read_bytes() == before


def test_what_cannot_be_exported_writes_nothing(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("vit")
    folder = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"model must have save_pretrained\(folder\), got Linear"):
        export_pretrained(one.ast, "s80", nn.Linear(2, 2), folder)
    with pytest.raises(ConfigError, match="model must have save_pretrained"):
        export_pretrained(one.ast, "s80", None, folder)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"source must be a run, .*, got '.*ast_plugin\.load\(folder, model\)"):
        export_pretrained(str(one.folder), "s80", one.ast.model, folder)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="processing_class must have save_pretrained"):
        export_pretrained(one.ast, "s80", one.ast.model, folder, processing_class="tokenizer")
    with pytest.raises(ConfigError, match="no sub-net 's8': did you mean 's80'"):
        export_pretrained(one.ast, "s8", one.ast.model, folder)
    with pytest.raises(ElasticFileError, match="does not fit the model"):
        export_pretrained(one.ast, "s80", gpt2(), folder)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_refused(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("gpt2")
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SaveError, match="a file has that name"):
        export_pretrained(one.ast, "s80", one.ast.model, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_adapted_model_is_refused_by_its_mark(models: SavedModels, tmp_path: Path) -> None:
    one = models.of("gpt2")
    model: PreTrainedModel = one.fresh()
    model._hf_peft_config_loaded = True  # as add_adapter() sets it
    with pytest.raises(ConfigError, match=r"with adapters.*merge_and_unload\(\)\.save_pretrained\(folder\)"):
        export_pretrained(one.ast, "s80", model, tmp_path / "out")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft asks it
def test_a_model_of_peft_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from ast_plugin.export import export_model

    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(gpt2(), settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or "mlp" in name)
    ast = train("gpt2", model)
    assert all("mlp" in name or "lora" in name for name in ast.masks.parameters)
    with pytest.raises(ConfigError, match="model is a PeftModel with adapters"):
        export_pretrained(ast, "s80", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_model(ast, "s80", model).merge_and_unload().save_pretrained(tmp_path / "out")  # type: ignore[operator]
    found = type(model.get_base_model()).from_pretrained(tmp_path / "out")
    with ast.sub_net("s80"):
        assert torch.allclose(logits(found, "gpt2"), logits(model, "gpt2"), atol=1e-5)
    name = "transformer.h.0.mlp.c_fc.weight"
    zeros = 1 - ast.masks.sparsity("s80", f"base_model.model.{name}")
    assert (found.get_parameter(name) != 0).float().mean().item() == pytest.approx(zeros)

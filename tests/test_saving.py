"""Posteriors beside their adapters: saved, shared, loaded, or refused for a reason."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from laplace.curvature import AsdlGGN, CurvlinopsGGN
from models import (
    CHOICE_TOKENS,
    HAS_ELLA,
    HEADS,
    chunks,
    frozen,
    inputs_of,
    letter_batch,
    letter_head,
    mlp_batch,
    scoring_head,
    snapshot,
    tiny_bert_classifier,
    tiny_llama,
    tiny_mlp,
)
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

import laplace_llm
from laplace_llm import MultipleChoiceHead, StreamingEF, from_pretrained
from laplace_llm.errors import AdapterError, NotFittedError, OptionError, StateError, StorageError
from laplace_llm.fingerprint import fingerprint
from laplace_llm.saving import CONFIG, FORMAT_VERSION, WEIGHTS

OPTIONS: dict[str, dict[str, Any]] = {
    "kron": {},
    "kron, damped": {"damping": True},
    "kron, rank 2, expand": {"backend_kwargs": {"rank": 2, "kfac_approx": "expand"}},
    "kron, sampled": {"backend_kwargs": {"stochastic": True, "mc_samples": 2}},
    "kron, empirical": {"backend": StreamingEF},
    "kron, curvlinops": {"backend": CurvlinopsGGN},
    "kron, asdl": {"backend": AsdlGGN},
    "kron, B": {"tensors": "B"},
    "ekfac": {},
    "ekfac, rank 2": {"backend_kwargs": {"rank": 2}},
    "lowrank": {},
    "lowrank, truncated": {"max_rank": 4},
    "diag": {},
    "full": {"tensors": "B"},
    "gp": {},
    "gp, independent subset": {"independent_outputs": True, "n_subset": 5, "seed": 3},
}
PRIOR = {"temperature": 0.5, "prior_mean": 0.1}


def fitted(structure: str = "kron", head: str = "letters", **kwargs: Any) -> Any:
    """Return a posterior with a temperature, a prior mean and a prior precision a tensor."""
    setup = HEADS[head]()
    la = laplace_llm.Laplace(
        setup.model,
        hessian_structure=structure.partition(",")[0],
        **{**PRIOR, **OPTIONS[structure], **kwargs},
    )
    la.fit(chunks(setup.make_batch(6), 4))
    la.prior_precision = torch.linspace(0.5, 2, len(la.tensors), dtype=torch.float64)
    return la


def answers(la: Any, head: str = "letters") -> Any:
    """Return everything that a posterior says, to compare with ``==``, bit for bit."""
    x = inputs_of(HEADS[head]().make_batch(4, seed=5))
    parts = {"qmc": la(x), "probit": la(x, link_approx="probit"), "state": la.state_dict()}
    if not getattr(la, "independent_outputs", False):
        parts["samples"] = la.sample(2, torch.Generator().manual_seed(0))
    parts["state"]["prior_mean"] = torch.as_tensor(la.prior_mean, dtype=torch.float64)
    evidence = la.log_marginal_likelihood().detach()
    return frozen({**parts, "evidence": evidence})


# There and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", OPTIONS)
def test_a_round_trip_is_exact(structure, tmp_path):
    torch.manual_seed(0)
    la = fitted(structure)
    model = snapshot(la.model)
    la.save_pretrained(tmp_path)
    assert snapshot(la.model) == model
    fresh = letter_head()
    model = snapshot(fresh)
    loaded = from_pretrained(fresh, tmp_path)
    assert snapshot(fresh) == model
    assert type(loaded) is type(la)
    assert answers(loaded) == answers(la)
    assert loaded.backend.__class__ is la.backend.__class__
    for key in ("n_data", "n_outputs", "temperature", "likelihood", "dict_key_x", "adapter"):
        assert getattr(loaded, key) == getattr(la, key)
    for key in ("damping", "max_rank", "n_subset", "independent_outputs", "seed"):
        assert getattr(loaded, key, None) == getattr(la, key, None)
    for key in ("kfac_approx", "stochastic", "mc_samples"):
        assert getattr(loaded.backend, key, None) == getattr(la.backend, key, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("structure", ["kron", "lowrank"])
def test_every_head_and_model(head, structure, tmp_path):
    la = fitted(structure, head)
    la.save_pretrained(tmp_path)
    loaded = from_pretrained(HEADS[head]().model, tmp_path)
    assert answers(loaded, head) == answers(la, head)


@pytest.mark.parametrize("head", ["letters", "scored", "classifier"])
def test_a_model_without_its_head_gets_the_one_that_was_saved(head, tmp_path):
    la = fitted(head=head)
    la.save_pretrained(tmp_path)
    loaded = from_pretrained(HEADS[head]().model.model, tmp_path)
    assert type(loaded.model) is type(la.model)
    assert answers(loaded, head) == answers(la, head)


@pytest.mark.parametrize("likelihood", ["regression", "reward_modeling"])
def test_other_likelihoods(likelihood, tmp_path):
    if likelihood == "regression":
        kwargs, make = {"sigma_noise": 0.3}, lambda: tiny_mlp()
        batch: Any = mlp_batch(5, regression=True)
    else:
        kwargs, make = {}, lambda: HEADS["pairs"]().model
        batch = HEADS["pairs"]().make_batch(5)
    la = laplace_llm.Laplace(make(), likelihood, **kwargs)
    la.fit([batch])
    la.save_pretrained(tmp_path)
    loaded = from_pretrained(make(), tmp_path)
    x = inputs_of(batch)
    if likelihood == "reward_modeling":
        x = {key: value[:, 0] for key, value in x.items() if key != "labels"}
    assert frozen(loaded(x)) == frozen(la(x))
    assert float(loaded.sigma_noise) == float(la.sigma_noise)
    assert torch.equal(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())


@pytest.mark.skipif(not HAS_ELLA, reason="laplace-torch before 0.3 has no ELLA")
@pytest.mark.parametrize(
    ("name", "options", "fit"),
    [
        ("nystrom", {"subsample_size": 5, "n_eigenvalues": 4}, {}),
        ("variational", {"inducing_locations": "random", "num_inducing": 3}, {"iterations": 3}),
    ],
)
def test_ella_and_valla(name, options, fit, tmp_path):
    batch = letter_batch(6)
    rows = [{key: value[index] for key, value in batch.items()} for index in range(6)]
    la = laplace_llm.Laplace(
        letter_head(), hessian_structure="gp", functional_approximation=name, **options
    )
    la.fit(DataLoader(rows, batch_size=3), **fit)  # type: ignore[arg-type]
    la.save_pretrained(tmp_path)
    loaded = from_pretrained(letter_head().model, tmp_path)
    assert type(loaded) is type(la)
    assert torch.equal(loaded(letter_batch(4, seed=5)), la(letter_batch(4, seed=5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_precision(dtype, tmp_path):
    la = laplace_llm.Laplace(letter_head(dtype=dtype))
    la.fit([letter_batch(4)])
    la.save_pretrained(tmp_path)
    loaded = from_pretrained(letter_head(dtype=dtype), tmp_path)
    assert torch.equal(loaded(letter_batch(3)), la(letter_batch(3)))


def test_many_prior_precisions_are_exact_too(tmp_path):
    la = fitted("diag")
    la.prior_precision = torch.linspace(0.1, 3, la.n_params, dtype=torch.float64)
    la.prior_mean = torch.linspace(-1, 1, la.n_params, dtype=torch.float64)
    la.save_pretrained(tmp_path)
    loaded = from_pretrained(letter_head(), tmp_path)
    assert torch.equal(loaded.prior_precision, la.prior_precision)
    assert torch.equal(loaded.prior_mean, la.prior_mean)


def test_a_loaded_posterior_takes_more_data_and_can_be_tuned(tmp_path):
    la, more = fitted(), letter_batch(4, seed=2)
    la.save_pretrained(tmp_path)
    loaded = from_pretrained(letter_head(), tmp_path)
    for posterior in (la, loaded):
        posterior.fit([more], override=False)
        posterior.optimize_prior_precision(val_loader=[letter_batch(5, seed=3)], grid_size=5)
    assert answers(loaded) == answers(la)


def test_saving_twice_gives_the_same_files_and_the_last_one_counts(tmp_path):
    la = fitted()
    la.save_pretrained(tmp_path / "a")
    from_pretrained(letter_head(), tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    la.prior_precision = 123.0
    la.save_pretrained(tmp_path / "a")
    assert float(from_pretrained(letter_head(), tmp_path / "a").prior_precision) == 123


def test_factors_may_live_elsewhere_afterwards(tmp_path):
    la = fitted("lowrank")
    la.save_pretrained(tmp_path)
    loaded = from_pretrained(letter_head(), tmp_path, factors_on="disk")
    assert loaded.H.store.factors_on == "disk"
    assert answers(loaded) == answers(la)


@pytest.mark.parametrize(("structure", "columns"), [("kron", 2 * 64), ("ekfac", 2 * 64)])
def test_the_files_are_as_large_as_the_factors(structure, columns, tmp_path):
    """Of a side of d = 3,000: 2 x 64 eigenvectors, where a dense factor has d x d numbers."""
    dim = 3_000
    model = tiny_mlp(dtype=torch.float32, inputs=dim, targets=("first",))
    la = laplace_llm.Laplace(model, hessian_structure=structure)
    la.fit([(torch.ones(2, dim), torch.tensor([0, 1]))])
    la.save_pretrained(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 1.05 * 4 * dim * columns + 10_000
    assert size < 4 * dim * dim / 20


def test_the_configuration_tells_what_the_posterior_is(tmp_path):
    la = fitted("kron", backend_kwargs={"rank": 5})
    la.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["format_version"] == FORMAT_VERSION
    assert config["hessian_structure"] == "kron"
    assert config["likelihood"] == "classification"
    assert config["options"]["backend_kwargs"] == {
        "kfac_approx": "reduce", "rank": 5, "stochastic": False, "mc_samples": 1,
    }  # fmt: skip
    assert config["adapter"] == "default"
    assert config["head"] == {
        "class": "MultipleChoiceHead",
        "choice_token_ids": list(CHOICE_TOKENS[:3]),
    }
    state = config["state"]
    assert state["prior_precision"] == la.prior_precision.tolist()
    assert (state["temperature"], state["n_data"], state["n_outputs"]) == (0.5, 6, 3)
    assert [*config["tensors"].values()] == [list(tensor.shape) for tensor in la.tensors]
    assert config["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert config["adapter_sha256"] == fingerprint(la.model, "default")


def test_no_pickle_and_no_code(tmp_path):
    fitted("gp").save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)  # a plain safetensors file
    config = json.loads((tmp_path / CONFIG).read_text())
    for key, name in (("class", "os.system"), ("head", {"class": "os.system"})):
        write(tmp_path, {**config, key: name})
        with pytest.raises(StateError, match=r"os\.system"):
            from_pretrained(letter_head().model, tmp_path)


# Beside the adapter -------------------------------------------------------------------------------


def trained(adapter: str = "default") -> PeftModel:
    """Return a model with an adapter that is other than any new one."""
    model = tiny_llama()
    if adapter != "default":
        model.add_adapter(adapter, LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter(adapter)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f".{adapter}." in name:
                weight.add_(0.1)
    return model


def base() -> LlamaForCausalLM:
    return tiny_llama().unload()


@pytest.mark.parametrize("adapter", ["default", "second"])
def test_pefts_adapter_and_our_posterior_share_a_folder(adapter, tmp_path):
    model = trained(adapter)
    la = laplace_llm.Laplace(MultipleChoiceHead(model, CHOICE_TOKENS))
    la.fit([letter_batch(6, classes=5)])
    model.save_pretrained(tmp_path, selected_adapters=[adapter])
    la.save_pretrained(tmp_path)
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    assert {CONFIG, WEIGHTS, "adapter_model.safetensors"} <= {p.name for p in folder.iterdir()}
    other = PeftModel.from_pretrained(base(), folder)  # under the name "default", and frozen
    before = snapshot(other)
    loaded = from_pretrained(other, folder)
    assert loaded.adapter == "default"
    assert torch.equal(loaded(letter_batch(3)), la(letter_batch(3)))
    assert snapshot(other) == before


def test_an_adapter_beside_others_can_be_named(tmp_path):
    model = trained("second")
    la = laplace_llm.Laplace(letter_head(model), adapter="second")
    la.fit([letter_batch(5)])
    la.save_pretrained(tmp_path)
    for name in ("second", None):
        loaded = from_pretrained(letter_head(model), tmp_path / "second", adapter=name)
        assert torch.equal(loaded(letter_batch(3)), la(letter_batch(3)))
    model.set_adapter("default")
    with pytest.raises(AdapterError, match="'second' is not active"):
        from_pretrained(letter_head(model), tmp_path / "second")


def test_another_base_model_is_warned_of(tmp_path):
    model, other = trained(), trained()
    model.peft_config["default"].base_model_name_or_path = "some/base"
    la = laplace_llm.Laplace(letter_head(model))
    la.fit([letter_batch(5)])
    la.save_pretrained(tmp_path)
    other.peft_config["default"].base_model_name_or_path = "another/base"
    with pytest.warns(UserWarning, match="'some/base', and this one is 'another/base'"):
        from_pretrained(other, tmp_path)


def test_classifiers_keep_what_peft_trains_besides(tmp_path):
    """A retrained classification layer is another model, though the LoRA weights are the same."""
    la = laplace_llm.Laplace(tiny_bert_classifier(), include_modules_to_save=True)
    la.fit([letter_batch(5)])
    la.save_pretrained(tmp_path)
    model = tiny_bert_classifier()
    assert torch.equal(from_pretrained(model, tmp_path)(letter_batch(3)), la(letter_batch(3)))
    plain = laplace_llm.Laplace(tiny_bert_classifier())
    plain.fit([letter_batch(5)])
    plain.save_pretrained(tmp_path)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(0.1)
    with pytest.raises(StateError, match="others"):
        from_pretrained(model, tmp_path)


def test_a_new_process_predicts_the_same(tmp_path):
    model = trained()
    la = laplace_llm.Laplace(letter_head(model))
    la.fit([letter_batch(6)])
    base().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    la.save_pretrained(tmp_path / "adapter")
    torch.save(la(letter_batch(3)), tmp_path / "expected.pt")
    script = """
import sys, torch, laplace_llm
from models import letter_batch, tiny_llama
from peft import PeftModel
folder = sys.argv[1]
model = PeftModel.from_pretrained(tiny_llama().unload(), folder + "/adapter")
la = laplace_llm.from_pretrained(model, folder + "/adapter")
assert torch.equal(la(letter_batch(3)), torch.load(folder + "/expected.pt"))
"""
    threads = str(torch.get_num_threads())  # the last digits depend on it
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# Files that are not what they should be -----------------------------------------------------------


def write(folder: Path, config: dict[str, Any], seal: bool = True) -> None:
    """Write a configuration, with the checksum that it should have."""
    if seal:
        content = {key: value for key, value in config.items() if key != "config_sha256"}
        text = json.dumps(content, sort_keys=True)
        config = {**content, "config_sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / CONFIG).write_text(json.dumps(config))


def edited(change: Callable[[dict[str, Any]], Any], seal: bool = True) -> Callable:
    def act(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        write(folder, config, seal)

    return act


def bytes_of(name: str, change: Callable[[bytearray], Any]) -> Callable:
    def act(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        change(content)
        (folder / name).write_bytes(content)

    return act


def resealed(change: Callable[[dict[str, Any]], Any]) -> Callable:
    """Change the tensors and every checksum: a file that is consistent, and wrong."""

    def act(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        content = (folder / WEIGHTS).read_bytes()
        sums = {
            "weights_sha256": hashlib.sha256(content).hexdigest(),
            "weights_bytes": len(content),
        }
        edited(lambda config: config.update(sums))(folder)

    return act


def flip(content: bytearray) -> None:
    content[-3] ^= 1


FACTOR = "H.pairs.1.outputs.matrix"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        pytest.param(
            lambda f: (f / CONFIG).unlink(), f"{CONFIG} in .*save_pretrained", id="no-cfg"
        ),
        pytest.param(
            lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} in .*save_pretr", id="no-weights"
        ),
        pytest.param(lambda f: shutil.rmtree(f), f"{CONFIG} in ", id="no-folder"),
        pytest.param(
            bytes_of(CONFIG, lambda b: b.__delitem__(slice(300, None))),
            "JSON in .*breaks off",
            id="config-cut",
        ),
        pytest.param(
            bytes_of(CONFIG, lambda b: b.clear()), "JSON in .*breaks off", id="config-empty"
        ),
        pytest.param(
            bytes_of(CONFIG, lambda b: b.insert(0, 0xFF)),
            "text in .*cannot be read",
            id="config-binary",
        ),
        pytest.param(
            lambda f: (f / CONFIG).write_text("[1]"), "say its format_version", id="config-list"
        ),
        pytest.param(
            edited(lambda c: c.pop("format_version")), "say its format_version", id="no-version"
        ),
        pytest.param(
            edited(lambda c: c.update(format_version=2)),
            "has 2, of a newer release.*pip install -U",
            id="newer",
        ),
        pytest.param(
            edited(lambda c: c.pop("adapter_sha256")), "'adapter_sha256'.*missing", id="missing-key"
        ),
        pytest.param(edited(lambda c: c.pop("state")), "'state'.*missing", id="missing-state"),
        pytest.param(
            edited(lambda c: c["state"].update(temperature=9.0), seal=False),
            "changed afterwards",
            id="config-edited",
        ),
        pytest.param(
            edited(lambda c: c["state"].pop("n_data")), "state with 'n_data'", id="state-key"
        ),
        pytest.param(
            edited(lambda c: c["state"].pop("H.sources")),
            "state with 'sources'",
            id="curvature-key",
        ),
        pytest.param(
            edited(lambda c: c["state"].update(prior_precision=[-1.0])),
            r"positive.*-1\.0",
            id="prior",
        ),
        pytest.param(
            edited(lambda c: c.update({"class": "MyLaplace"})),
            "posterior out of.*'MyLaplace'",
            id="class",
        ),
        pytest.param(
            edited(lambda c: c["options"].update(backend="Mine")),
            "backend out of.*'Mine'.*backend=",
            id="backend",
        ),
        pytest.param(
            edited(lambda c: c.update(dtype="float32")),
            "adapter in float32, but it is in float64",
            id="dtype",
        ),
        pytest.param(
            bytes_of(WEIGHTS, lambda b: b.__delitem__(slice(-10, None))),
            r"11,0\d\d bytes.*truncated",
            id="weights-cut",
        ),
        pytest.param(bytes_of(WEIGHTS, flip), "been changed .by SHA-256", id="weights-tampered"),
        pytest.param(
            resealed(lambda t: t.pop(FACTOR)),
            "state with 'outputs'",
            id="tensor-missing",
        ),
        pytest.param(
            resealed(lambda t: t.update({FACTOR: t[FACTOR][:2, :2].clone()})),
            r"shape \(16, 16\).*\(2, 2\)",
            id="tensor-shape",
        ),
    ],
)
def test_files_that_are_not_whole(act, message, tmp_path):
    fitted(**{"prior_mean": 0.0}).save_pretrained(tmp_path)
    model = letter_head()
    before = snapshot(model)
    act(tmp_path)
    error = Exception if message.startswith("positive") else StateError
    with pytest.raises(error, match=message) as caught:
        from_pretrained(model, tmp_path)
    assert isinstance(caught.value, laplace_llm.LaplaceLLMError)
    assert snapshot(model) == before


def retrained() -> Any:
    model = letter_head()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).view(-1)[0].add_(1e-12)
    return model


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (retrained, StateError, "very weights.*trained on"),
        (lambda: letter_head(tiny_llama(seed=1)), StateError, "very weights.*'default' has others"),
        (
            lambda: letter_head(rank=2),
            StateError,
            r"lora_A\.weight' is of shape \(3, 16\).*\(2, 16\)",
        ),
        (lambda: letter_head(targets=("q_proj",)), StateError, r"v_proj.*\(3, 16\).*missing"),
        (
            lambda: letter_head(targets=("q_proj", "v_proj", "k_proj")),
            StateError,
            r"k_proj.* is missing, but that of the model is of shape",
        ),
        (lambda: letter_head(dtype=torch.float32), StateError, "in float64, but it is in float32"),
        (
            lambda: letter_head(classes=2),
            StateError,
            r"choice_token_ids': \[11, 23, 37\].*\[11, 23\]",
        ),
        (scoring_head, StateError, "MultipleChoiceHead.*ChoiceScoringHead"),
        (tiny_bert_classifier, OptionError, "causal language model, but got BertFor"),
        (lambda: base(), AdapterError, "PEFT LoRA layers"),
    ],
)
def test_models_that_a_posterior_does_not_belong_to(build, error, message, tmp_path):
    fitted().save_pretrained(tmp_path)
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        from_pretrained(model, tmp_path)
    assert snapshot(model) == before


def test_other_active_adapters_are_refused(tmp_path):
    model = trained("second")
    model.base_model.set_adapter(["default", "second"])
    la = laplace_llm.Laplace(letter_head(model), adapter="second")
    la.fit([letter_batch(5)])
    la.save_pretrained(tmp_path)
    model.set_adapter("second")
    with pytest.raises(AdapterError, match=r"\['default', 'second'\].*but \['second'\]"):
        from_pretrained(letter_head(model), tmp_path / "second")


# Saving that fails --------------------------------------------------------------------------------


def test_saving_needs_a_fit(tmp_path):
    with pytest.raises(NotFittedError):
        laplace_llm.Laplace(letter_head()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_was_trained_on_is_not_saved_with(tmp_path):
    la = fitted()
    with torch.no_grad():
        la.tensors[2].weight.mul_(1.01)
    with pytest.raises(StateError, match="weights that it had in fit"):
        la.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_options_that_json_does_not_hold(tmp_path):
    la = fitted("kron, asdl")
    la._asdl_fisher_kwargs = {"what": object}
    with pytest.raises(OptionError, match="JSON"):
        la.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["save_file", "os.replace", "os.fsync"])
def test_a_failed_save_leaves_what_was_there(place, error, call, tmp_path, monkeypatch):
    la = fitted()
    la.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    la.prior_precision = 9.0
    model, earlier, calls = snapshot(la.model), answers(la), []
    module, _, name = f"laplace_llm.files.{place}".rpartition(".")
    original = getattr(sys.modules.get(module, os), name)

    def fail(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error("bomb")
        return original(*args)

    monkeypatch.setattr(f"laplace_llm.files.{place}", fail)
    if place == "save_file" and call == 2:
        la.save_pretrained(tmp_path)  # there is one such file only
        return
    with pytest.raises(StorageError if error is OSError else error, match="bomb"):
        la.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert snapshot(la.model) == model
    assert answers(la) == earlier
    if call == 1:
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    la.save_pretrained(tmp_path)
    assert float(from_pretrained(letter_head(), tmp_path).prior_precision) == 9


def test_one_process_of_several_writes(tmp_path):
    fitted().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_unknown_arguments_are_refused(tmp_path):
    with pytest.raises(OptionError, match="'safe'"):
        fitted().save_pretrained(tmp_path, safe=True)


# The Hub ------------------------------------------------------------------------------------------


class Hub:
    """What a repository on the Hub holds after commits, as Hugging Face caches it on this machine.

    The network is replaced, everything on either side of it is real.
    """

    def __init__(self, cache: Path) -> None:
        self.repository = cache / "models--team--adapter"
        self.card = "---\nlibrary_name: peft\n---\nAn adapter.\n"

    def commit(self, *args: Any, operations: list[Any], **kwargs: Any) -> str:
        snapshot_ = self.repository / "snapshots" / ("0" * 40)
        snapshot_.mkdir(parents=True, exist_ok=True)
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, snapshot_ / operation.path_in_repo)
        (self.repository / "refs").mkdir(exist_ok=True)
        (self.repository / "refs" / "main").write_text("0" * 40)
        return "commit"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "cache")

    class Repository:
        repo_id = "team/adapter"

    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: Repository())
    monkeypatch.setattr(HfApi, "create_commit", hub.commit)
    monkeypatch.setattr(ModelCard, "load", lambda *args, **kwargs: ModelCard(hub.card))
    return hub


@pytest.mark.parametrize("through", ["push_to_hub", "save_pretrained"])
def test_pushed_and_loaded_by_the_repositorys_name(through, hub, tmp_path):
    la = fitted()
    if through == "push_to_hub":
        la.push_to_hub("team/adapter")
    else:
        la.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="team/adapter")
    loaded = from_pretrained(letter_head().model, "team/adapter", cache_dir=tmp_path / "cache")
    assert answers(loaded) == answers(la)
    card = next(hub.repository.glob("snapshots/*/README.md"))
    assert "An adapter." in card.read_text()  # the adapter's own, as it was


def test_a_repository_that_is_not_there(tmp_path):
    with pytest.raises(StateError, match=r"laplace_config.json in 'team/nothing'.*push_to_hub"):
        from_pretrained(letter_head(), "team/nothing", cache_dir=tmp_path)


# The format ---------------------------------------------------------------------------------------

FORMATS = Path(__file__).parent / "data" / "formats"
KEPT = ("kron", "kron, rank 2, expand", "ekfac", "lowrank", "diag", "full", "gp")


def format_case(structure: str) -> Any:
    la = laplace_llm.Laplace(
        tiny_mlp(), hessian_structure=structure.partition(",")[0], **OPTIONS[structure]
    )
    la.fit([mlp_batch(6)])
    la.prior_precision = 2.0
    return la


@pytest.mark.parametrize("structure", KEPT)
@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_files_of_every_version_are_read(version, structure):
    """They are kept in the repository, and were written when the version was current."""
    folder = FORMATS / str(version)
    model = tiny_mlp()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    la = from_pretrained(model, folder, subfolder=structure.replace(", ", "-").replace(" ", "-"))
    expected = json.loads((folder / "predictions.json").read_text())[structure]
    torch.testing.assert_close(
        la(mlp_batch(3, seed=1)[0]).tolist(), expected, rtol=1e-9, atol=1e-12
    )


def write_current_format() -> None:
    """Write what the test above reads; run this once where FORMAT_VERSION was raised."""
    folder, predictions = FORMATS / str(FORMAT_VERSION), {}
    folder.mkdir(parents=True)
    save_file(tiny_mlp().state_dict(), folder / "model.safetensors")
    for structure in KEPT:
        la = format_case(structure)
        la.save_pretrained(folder / structure.replace(", ", "-").replace(" ", "-"))
        predictions[structure] = la(mlp_batch(3, seed=1)[0]).tolist()
    (folder / "predictions.json").write_text(json.dumps(predictions, indent=1) + "\n")


if __name__ == "__main__":
    write_current_format()

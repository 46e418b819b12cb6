"""Figures of the published MSA code, reproduced through the public API.

`MSA_HF_GOLDENS` names another directory of such cases; everything a case holds is checked.
"""

import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msa_hf import MSAForCausalLM
from msa_hf.model.losses_msa import auxiliary_loss, router_loss
from msa_hf.model.routing_msa import normalize_heads, score_documents, scoring_of

CASES = sorted(Path(os.environ.get("MSA_HF_GOLDENS", Path(__file__).parent / "cases")).glob("*.json"))
STATES = {"atol": 5e-5, "rtol": 0.0}


@dataclass
class Case:
    """One case: its description, its tensors, and a published checkpoint made of them."""

    path: Path
    directory: Path

    @cached_property
    def spec(self) -> dict:
        return json.loads(self.path.read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def layers(self, group: str, tensor: str) -> list[int]:
        """Layers of which `group` holds `tensor`."""
        parts = [
            name.removeprefix(f"{group}/layer").split("/") for name in self.tensors if name.startswith(f"{group}/layer")
        ]
        return sorted(int(layer) for layer, name in parts if name == tensor)

    @cached_property
    def prefix(self) -> list[int]:
        return self["s1/input_ids"][0, : self.spec["template_len"]].tolist()

    @cached_property
    def documents(self) -> list[list[int]]:
        ids, owner = self["s1/input_ids"][0], self["s1/doc_ids"][0]
        return [ids[owner == number].tolist() for number in range(1, int(owner.max()) + 1)]

    def publish(self) -> Path:
        """Write the checkpoint in the published layout."""
        config = {**self.spec["hf_config"], "model_type": "msa", "architectures": ["MSAForCausalLM"]}
        config["msa_config"] = self.spec["msa_config"]
        (self.directory / "config.json").write_text(json.dumps(config))
        weights = {
            name.removeprefix("weights/"): value for name, value in self.tensors.items() if name.startswith("weights/")
        }
        save_file(weights, self.directory / "model.safetensors", metadata={"format": "pt"})
        return self.directory

    def logits_close(self, ours: Tensor, theirs: Tensor) -> None:
        largest = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, atol=max(2e-4, 2e-5 * largest), rtol=0.0)


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.stem)
def case(request, tmp_path_factory) -> Case:
    case = Case(request.param, tmp_path_factory.mktemp(request.param.stem))
    case.publish()
    return case


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request, case) -> nn.Module:
    return MSAForCausalLM.from_pretrained(
        case.directory, prefix_token_ids=case.prefix, attn_implementation=request.param
    ).eval()


@pytest.fixture(scope="module")
def bank(model, case):
    return model.encode_documents(case.documents, show_progress=False)


def test_there_are_cases() -> None:
    assert CASES, "no *.json in the directory of goldens"


def test_config(model, case) -> None:
    assert model.config.first_position == case.spec["query_position_offset"]
    assert model.config.prefix_length == case.spec["template_len"]
    assert [document for document in map(len, case.documents)] == case.spec["doc_lens"]


def test_every_weight_was_loaded(case) -> None:
    _, info = MSAForCausalLM.from_pretrained(case.directory, output_loading_info=True)
    unused = {name for name in info["unexpected_keys"] if "router" in name}
    assert not info["missing_keys"] - {"lm_head.weight"} and not set(info["unexpected_keys"]) - unused
    # A shared router has no projections to load, whether or not the checkpoint carries some.
    assert not unused or not case.spec["msa_config"]["decouple_router"]


def test_encoding(model, bank, case) -> None:
    assert (
        [document.chunks for document in bank.documents]
        == case["s1/chunks_per_doc"].tolist()
        == case.spec["chunks_per_doc"]
    )
    layers = case.layers("s1", "pooled_k")
    assert list(bank.layers) == layers
    owner = torch.repeat_interleave(torch.arange(1, len(bank) + 1), case["s1/chunks_per_doc"])
    assert torch.equal(owner, case["s1/pooled_doc_ids"])
    for layer in layers:
        memory = bank.layer(layer)
        torch.testing.assert_close(memory.keys.transpose(0, 1), case[f"s1/layer{layer}/pooled_k"][0], **STATES)
        torch.testing.assert_close(memory.values.transpose(0, 1), case[f"s1/layer{layer}/pooled_v"][0], **STATES)
        router_key = memory.routing_keys.unflatten(1, (-1, memory.keys.shape[-1])).transpose(0, 1)
        torch.testing.assert_close(router_key, case[f"s1/layer{layer}/router_k"][0], **STATES)
    for layer in case.layers("s1", "template_k"):
        key, value = bank.prefix[layer]
        torch.testing.assert_close(key, case[f"s1/layer{layer}/template_k"][0], **STATES)
        torch.testing.assert_close(value, case[f"s1/layer{layer}/template_v"][0], **STATES)


def test_documents_as_one_packed_row(model, case) -> None:
    with torch.no_grad():
        output = model(
            input_ids=case["s1/input_ids"],
            attention_mask=case["s1/attention_mask"],
            doc_ids=case["s1/doc_ids"],
            position_ids=case["s1/position_ids"],
            output_hidden_states=True,
        )
    torch.testing.assert_close(output.hidden_states[-1], case["s1/last_hidden_state"], atol=2e-4, rtol=0.0)


def attend(model, bank, case, group: str, **kwargs):
    mask = case[f"{group}/attention_mask"]
    kwargs.setdefault("position_ids", case[f"{group}/position_ids"])
    with torch.no_grad():
        return model(
            input_ids=case[f"{group}/input_ids"],
            attention_mask=mask,
            memory=bank,
            routing_mask=(case[f"{group}/doc_ids"] == 0) & mask.bool(),
            output_document_scores=True,
            **kwargs,
        )


@pytest.mark.parametrize("group", ["s2/b1", "s2/b2"])
def test_routing_and_context(model, bank, case, group) -> None:
    output = attend(model, bank, case, group)
    layers = case.layers(group, "doc_scores")
    assert sorted(output.routing) == layers
    for layer in layers:
        found, name = output.routing[layer], f"{group}/layer{layer}"
        torch.testing.assert_close(found.document_scores, case[f"{name}/doc_scores"], **STATES)
        theirs, scores = case[f"{name}/topk_doc_ids"], case[f"{name}/topk_scores"]
        for sample in range(theirs.shape[0]):
            there = scores[sample] > -1e9
            count = int(there.sum())
            assert found.documents[sample, :count].tolist() == theirs[sample][there].tolist()
            assert found.documents[sample, count:].tolist() == [-1] * (found.documents.shape[1] - count)
            torch.testing.assert_close(found.scores[sample, :count], scores[sample][there], **STATES)
        context = output.past_key_values.contexts[layer]
        assert context.rows_per_sample.tolist() == case[f"{name}/num_selected_chunks"].tolist()
        for ours, tensor in ((context.keys, "ctx_k"), (context.values, "ctx_v")):
            rows = [ours[sample][:, real] for sample, real in enumerate(context.row_mask)]
            rows = torch.cat([row[:, context.prefix_length :] for row in rows], dim=1)
            torch.testing.assert_close(rows, case[f"{name}/{tensor}"], **STATES)


@pytest.mark.parametrize("group", ["s2/b1", "s2/b2"])
def test_router_queries(model, bank, case, group) -> None:
    seen: dict[int, Tensor] = {}
    hooks = [
        module.router_q_proj.register_forward_hook(
            lambda _, __, output, layer=module.layer_idx: seen.__setitem__(layer, output)
        )
        for module in model.modules()
        if hasattr(module, "router_q_proj")
    ]
    attend(model, bank, case, group)
    for hook in hooks:
        hook.remove()
    config, mask = model.config, case[f"{group}/attention_mask"].bool()
    layers = case.layers(group, "routing_q")
    assert layers == config.memory_layers
    for layer in layers:
        theirs = case[f"{group}/layer{layer}/routing_q"].transpose(1, 2)
        if not config.shared_router:
            ours = seen[layer].unflatten(-1, theirs.shape[-2:])
            ours = normalize_heads(ours) if config.similarity == "cosine" else ours
            torch.testing.assert_close(ours[mask], theirs[mask], **STATES)
        scores = score_documents(
            theirs,
            (case[f"{group}/doc_ids"] == 0) & mask,
            bank.layer(layer).routing_keys,
            bank.offsets,
            scoring_of(config, config.similarity),
        )
        torch.testing.assert_close(scores, case[f"{group}/layer{layer}/doc_scores"], **STATES)


@pytest.mark.parametrize("positions", ["given", "default"])
@pytest.mark.parametrize("group", ["s2/b1", "s2/b2"])
def test_prefill_and_decode_logits(model, bank, case, group, positions) -> None:
    output = attend(model, bank, case, group, **({} if positions == "given" else {"position_ids": None}))
    mask = case[f"{group}/attention_mask"]
    case.logits_close(output.logits[mask.bool()], case[f"{group}/logits"][mask.bool()])
    steps, next_position = case[f"{group}/decode_ids"], case[f"{group}/position_ids"].max(1, keepdim=True).values + 1
    for step in range(steps.shape[1]):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        with torch.no_grad():
            decoded = model(
                input_ids=steps[:, step : step + 1],
                attention_mask=mask,
                position_ids=next_position + step if positions == "given" else None,
                past_key_values=output.past_key_values,
            )
        case.logits_close(decoded.logits[:, 0], case[f"{group}/decode_logits"][:, step])


@pytest.mark.parametrize("group", ["s2/b1", "s2/b2"])
def test_several_tokens_at_once_are_causal(model, bank, case, group) -> None:
    output = attend(model, bank, case, group)
    steps = case[f"{group}/decode_ids"]
    mask = torch.nn.functional.pad(case[f"{group}/attention_mask"], (0, steps.shape[1]), value=1)
    with torch.no_grad():
        decoded = model(input_ids=steps, attention_mask=mask, past_key_values=output.past_key_values)
    case.logits_close(decoded.logits, case[f"{group}/decode_logits"])
    quirk = case.tensors.get(f"{group}/quirk_block_logits_noncausal")
    if quirk is not None:
        assert (decoded.logits - quirk)[:, 0].abs().max() > 1e-3


def positive_docs(case) -> Tensor:
    labels = case["train/aux_labels"]
    numbers = torch.where(labels == 1, torch.arange(labels.shape[1]).expand_as(labels), -1)
    return numbers.sort(1, descending=True).values


def train(model, case, **kwargs):
    return model(
        input_ids=case["train/input_ids"],
        attention_mask=case["train/attention_mask"],
        doc_ids=case["train/doc_ids"],
        position_ids=case["train/position_ids"],
        **kwargs,
    )


def test_training_logits_and_scores(model, case) -> None:
    with torch.no_grad():
        output = train(model, case, output_hidden_states=True)
    mask = case["train/attention_mask"].bool()
    case.logits_close(output.logits[mask], case["train/logits"][mask])
    torch.testing.assert_close(
        output.hidden_states[-1][mask], case["train/last_hidden_state"][mask], atol=2e-4, rtol=0.0
    )
    for layer in case.layers("train", "doc_scores"):
        torch.testing.assert_close(
            output.routing[layer].document_scores, case[f"train/layer{layer}/doc_scores"][:, 1:], **STATES
        )


def test_training_losses_and_gradients(model, case) -> None:
    labels, answers = case["train/labels"], case["train/answer_labels"] != -100
    assert torch.equal(case["train/answer_labels"][answers], labels[answers])
    answers &= case["train/train_qa_samples"][:, None]
    model.zero_grad()
    output = train(model, case, labels=labels, answer_mask=answers, positive_docs=positive_docs(case))
    output.loss.backward()
    for name in ("lm_loss", "aux_loss", "answer_loss", "loss"):
        torch.testing.assert_close(getattr(output, name).detach(), case[f"train/{name}"], atol=1e-5, rtol=0.0)
    parameters = {re.sub(r"(router_[qk]_proj)\.", r"\1.0.", name): value for name, value in model.named_parameters()}
    norms = {name.removeprefix("train/grad_norm/") for name in case.tensors if name.startswith("train/grad_norm/")}
    assert norms == {name for name, value in parameters.items() if value.grad is not None}
    largest = max(case[f"train/grad_norm/{name}"].item() for name in norms)
    for name in norms:
        ours = parameters[name].grad.norm()
        torch.testing.assert_close(ours, case[f"train/grad_norm/{name}"], atol=2e-5 * largest, rtol=2e-5)
    for name in (name for name in case.tensors if name.startswith("train/grad/")):
        theirs = case[name]
        ours = parameters[name.removeprefix("train/grad/")].grad
        torch.testing.assert_close(ours, theirs, atol=2e-5 * theirs.abs().max().item(), rtol=0.0)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("INFONCE", "infonce"),
        ("INFONCE_DECOUPLE", "infonce_decoupled"),
        ("INFONCE_FOCAL", "infonce_focal"),
        ("INFONCE_DECOUPLE_FOCAL", "infonce_decoupled_focal"),
    ],
)
def test_every_form_of_the_auxiliary_loss(model, case, theirs, ours) -> None:
    scores = {layer: case[f"train/layer{layer}/doc_scores"][:, 1:] for layer in case.layers("train", "doc_scores")}
    labels = torch.nn.functional.pad(case["train/aux_labels"], (0, scores[min(scores)].shape[1]), value=-1)
    positives = labels[:, : scores[min(scores)].shape[1]] == 1
    temperature = case.spec["msa_config"]["infonce_loss_temp"]
    upper = [layer for layer in scores if layer >= case.spec["hf_config"]["num_hidden_layers"] // 2]
    # The published decoupled focal form passes the number of positives where gamma is meant; ours stays at 2.
    gammas = positives.sum(1).tolist() if ours == "infonce_decoupled_focal" else [2.0] * len(positives)
    values = [
        router_loss(scores[layer][[sample]], positives[[sample]], temperature, ours, gamma)
        for layer in upper
        for sample, gamma in enumerate(gammas)
    ]
    torch.testing.assert_close(torch.cat(values).mean(), case[f"train/aux_loss_{theirs}"], atol=1e-5, rtol=0.0)
    if ours == model.config.aux_loss:
        total = auxiliary_loss(scores, positives, model.config)
        torch.testing.assert_close(total, case["train/aux_loss"], atol=1e-5, rtol=0.0)


def test_language_model_loss_alone_leaves_the_routers_alone(model, case) -> None:
    if model.config.shared_router:
        pytest.skip("a shared router is the layer's attention, which the language model trains")
    model.zero_grad()
    train(model, case, labels=case["train/labels"]).loss.backward()
    for name, parameter in model.named_parameters():
        if "router" in name:
            assert parameter.grad is None or parameter.grad.abs().max() == 0
    assert not any(case.spec.get("router_grad_norm_from_lm_loss_only", {}).values())

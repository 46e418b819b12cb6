"""What a run that trains routers on a user's documents needs, read and checked; questions are welcome, none needed."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..data.questions import Question
from ..generation import PromptProtocol
from ..generation.prompting import ChatPrompting, prompting_of
from ..json_object import JsonObject
from ..model.configuration_msa import MSAConfig, full_attention_layers
from ..model.modeling_msa import MSAForCausalLM
from ..model.positions_msa import position_limit
from .pairs import PairMaker, Passage, cut_passages, words
from .pools import Asked, Coder
from .router_settings import RouterSettings
from .settings import SettingError, TrainingError

SETTINGS_FILE = "training_settings.json"
CHECKPOINT_FILE = "routers_checkpoint.pt"
LEAST_PASSAGES = 8
MOST_HELD_OUT = 200
DEPTH = 0.6  # of the memory layer of a base that has none


def reading_protocol(tokenizer: PreTrainedTokenizerBase) -> PromptProtocol:
    """Questions put as `prompting_of` does without a protocol, and answered from the texts that routers choose.

    With a chat template the texts follow the question in the user's message, and the answer is the assistant's.

    Raises:
        ValueError: for a chat template that does not show a user's message.
    """
    prompting = prompting_of(tokenizer)
    if isinstance(prompting, ChatPrompting):
        return _chat_protocol(tokenizer, prompting)
    end = tokenizer.eos_token
    return PromptProtocol(
        document="{text}{id!s:.0}",  # routers choose; no model reads ids from this memory
        prompt=(("{question}\n", True),),
        id_format="[{id}]",
        ids_end="\n",
        block_item="[{id}]\n{text}\n",
        block_end="---\n",
        retrieval_end="Question:",
        restated=" {question}\nAnswer:",
        answer_opening=" ",
        answer_end=end or "\n",
        special_tokens=(end,) if end else (),
    )


def _chat_protocol(tokenizer: PreTrainedTokenizerBase, prompting: ChatPrompting) -> PromptProtocol:
    (head, _), *_, (tail, _) = prompting.pieces([{"role": "user"}])
    end = tokenizer.convert_ids_to_tokens(prompting.ends[0]) if prompting.ends else "\n"
    markers = [token.content for token in tokenizer.added_tokens_decoder.values()]
    head, tail = (words.replace("{", "{{").replace("}", "}}") for words in (head, tail))
    return PromptProtocol(
        document="{text}{id!s:.0}",
        prompt=((head.rstrip(" "), False), (head[len(head.rstrip(" ")) :] + "{question}", True), ("\n", False)),
        id_format="[{id}]",
        ids_end="\n",
        block_item="[{id}]\n{text}\n",
        block_end="---\n",
        retrieval_end="Question:",
        restated=f" {{question}}{tail}",
        answer_opening="",
        answer_end=end,
        special_tokens=tuple(marker for marker in markers if marker in head + tail + end),
    )


@dataclass
class PreparedRouters:
    """A run that can begin.

    Attributes:
        settings: what was asked for.
        model: with a memory, on its device, routers as they were given.
        tokenizer: of the model.
        protocol: how documents and questions are wrapped, saved with the result.
        passages: of the documents, without repetitions.
        coder, maker: of their tokens and pairs.
        labeled: questions of the user's, to train on.
        measured: held-out questions.
        corpus: texts of all passages, those held out as they are to be found.
        whiten: set routers in closed form before the first step.
        retrofit: the base has a memory already.
        record: what must be the same for a run to go on.
        checkpoint: of an interrupted run, None for a new one.
        notes: what the user should know beforehand.
    """

    settings: RouterSettings
    model: MSAForCausalLM
    tokenizer: PreTrainedTokenizerBase
    protocol: PromptProtocol
    passages: list[Passage]
    coder: Coder
    maker: PairMaker
    labeled: list[Asked]
    measured: list[Asked]
    corpus: list[str]
    whiten: bool
    retrofit: bool
    record: JsonObject
    checkpoint: JsonObject | None
    notes: list[str] = field(default_factory=list)


def prepare_routers(
    settings: RouterSettings,
    documents: Mapping[str, str],
    questions: Sequence[Question] = (),
    protocol: PromptProtocol | None = None,
    titles: Mapping[str, str] | None = None,
    chat_template: bool = True,
) -> PreparedRouters:
    """Load the model and check the data, before anything is trained or written.

    Args:
        settings: of the run.
        documents: key -> text.
        questions: with `question`, `answer` and `positives`, as `read_questions` gives them; none are needed.
        protocol: that wraps documents and questions; None: questions are put by the tokenizer's chat template, else
            plainly, and the result gets a protocol that reads the texts of what the routers choose.
        titles: key -> title of documents that have one.
        chat_template: False: a chat template is not used, and the result gets none.

    Raises:
        TrainingError: for a mistake of the user's, `SettingError` where a setting is at fault.
    """
    if not documents:
        raise TrainingError("there are no documents to train on")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            "routers are trained by documents in one process, on one device; start it without a launcher"
        )
    output = Path(settings.output)
    _check_output(settings, output)
    model, tokenizer = _load(settings)
    if not chat_template:
        tokenizer.chat_template = None
    try:
        coder = Coder(tokenizer, protocol)  # the tokens of the protocol below are those of none, made faster
        protocol = reading_protocol(tokenizer) if protocol is None else protocol
        protocol.check_tokenizer(tokenizer)
    except ValueError as error:
        raise SettingError("protocol", "{} {}", error) from None
    positions = position_limit(model.config)
    notes = []
    if positions is not None and settings.max_length > (room := positions - model.config.first_position):
        notes.append(f"passages have at most {room} tokens, as the model has positions for no more")
        settings = replace(settings, max_length=room)
    wrapping = len(coder.documents([""], [len(documents)])[0])
    try:
        passages, repeated = cut_passages(documents, tokenizer, max(settings.max_length - wrapping, 1), titles)
    except ValueError as error:
        raise SettingError("max_length", "{1} ({0} {2})", error, settings.max_length) from None
    if repeated:
        notes.append(f"{len(repeated)} passages occur more than once and are taken once")
    if len(passages) < LEAST_PASSAGES:
        again = f", and {len(repeated)} that repeat them" if repeated else ""
        raise TrainingError(
            f"the documents have {len(passages)} different passages{again}; routers learn to tell passages apart, "
            f"which takes at least {LEAST_PASSAGES}"
        )
    record = {**settings.decisive(), "protocol": protocol.to_dict(), "data": _digest(documents, questions)}
    checkpoint = _checkpoint_to_resume(settings, output, record)
    maker = PairMaker(passages, settings.seed)
    labeled = _labeled(questions, list(documents), passages, repeated)
    if len(labeled) < len(questions):
        notes.append(
            f"{len(questions) - len(labeled)} of {len(questions)} questions name no document that answers them; routers"
            " learn nothing of these, and they are left out"
        )
    labeled, measured = _hold_out(settings, maker, labeled)
    corpus = [passage.text for passage in passages]
    for item in measured:
        if item.text is not None:
            corpus[item.gold[-1]] = item.text
    wanted = settings.first == "whiten" or (settings.first == "auto" and model.config.routers_trained is False)
    whiten = wanted and not model.config.shared_router
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError("output", "{} {}: {}", settings.output, error.strerror) from None
    return PreparedRouters(
        settings, model, tokenizer, protocol, passages, coder, maker, labeled, measured, corpus, whiten,
        _is_retrofit(settings.base), record, checkpoint, notes,
    )  # fmt: skip


def _check_output(settings: RouterSettings, output: Path) -> None:
    base = Path(settings.base)
    if output.is_dir() and base.is_dir() and output.samefile(base):
        raise SettingError("output", "{} {}: is the base itself; give another directory", output)
    other, kind = ("config.json", "a checkpoint") if settings.adapter else ("adapter_config.json", "an adapter")
    if (output / other).exists():
        raise SettingError("output", "{} {}: holds {}; give another directory", output, kind)


def _is_retrofit(base: str) -> bool:
    return isinstance(AutoConfig.from_pretrained(base), MSAConfig)


def _memory_fields(settings: RouterSettings) -> JsonObject:
    """The memory's fields that the settings choose; of a base without memory, all that its memory shall have."""
    chosen = {name: getattr(settings, name) for name in ("top_k", "chunk_size") if getattr(settings, name) is not None}
    if _is_retrofit(settings.base):
        if settings.memory_layers is not None:
            raise SettingError("memory_layers", "{}: {} has a memory already", settings.base)
        return chosen
    layers = settings.memory_layers
    if layers is None:
        config = AutoConfig.from_pretrained(settings.base)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        full = full_attention_layers(config)
        wanted = DEPTH * config.num_hidden_layers
        layers = (min(full, key=lambda layer: abs(layer - wanted)),) if full else None
    return {**chosen, "memory_layers": None if layers is None else list(layers), "query_reduction": "mean"}


def _load(settings: RouterSettings) -> tuple[Any, Any]:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or device.type == "mps":  # which lacks float64, in which routers are whitened
        device = torch.device("cpu")
    small = settings.bf16 or device.type != "cpu"
    try:
        fields = _memory_fields(settings)
        make = MSAForCausalLM.from_pretrained if _is_retrofit(settings.base) else MSAForCausalLM.from_base
        model = make(settings.base, dtype=torch.bfloat16 if small else torch.float32, **fields)
        tokenizer = AutoTokenizer.from_pretrained(settings.base)
    except SettingError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingError("base", "{} {}: {}", settings.base, error) from None
    if model.config.prefix_token_ids:
        raise SettingError("base", "{} {}: has a prefix, which routers are not trained with here", settings.base)
    return model.to(device).eval(), tokenizer


def _labeled(
    questions: Sequence[Question], keys: list[str], passages: Sequence[Passage], repeated: Sequence[tuple[int, int]]
) -> list[Asked]:
    """Questions with the passages of their documents; those that have the answer, where any has."""
    number = {key: place for place, key in enumerate(keys)}
    of_document: dict[int, list[int]] = {}
    for place, passage in enumerate(passages):
        of_document.setdefault(passage.document, []).append(place)
    for document, place in repeated:
        of_document.setdefault(document, []).append(place)
    found = []
    for question in questions:
        gold = [place for key in question["positives"] for place in of_document.get(number[key], [])]
        gold = list(dict.fromkeys(gold))
        having = [place for place in gold if _says(passages[place].text, question["answer"])]
        if gold:
            found.append(Asked(question["question"], "question", tuple(having or gold), None, question["answer"]))
    return found


def _says(text: str, answer: str) -> bool:
    """Tell whether a text has the words of an answer, which are some, one after the other."""
    wanted = " ".join(words(answer))
    return bool(wanted) and wanted in " ".join(words(text))


def _hold_out(settings: RouterSettings, maker: PairMaker, labeled: Sequence[Asked]) -> tuple[list[Asked], list[Asked]]:
    """Labeled questions to train on; a pair each of some passages, and labeled questions, to measure with."""
    count = len(maker.passages)
    wanted = min(MOST_HELD_OUT, count // 5) if settings.held_out is None else settings.held_out
    if wanted > count // 2:
        raise SettingError("held_out", "{} {}: of {} passages at most {}", wanted, count, count // 2)
    pick = random.Random(f"{settings.seed}, held out")
    answers: dict[int, list[str]] = {}
    for item in labeled:
        for place in item.gold:
            answers.setdefault(place, []).append(item.answer or "")
    measured: list[Asked] = []
    others = 0  # passages that ask something and are not held out, of those looked at
    for place in pick.sample(range(count), count):
        if len(measured) == wanted:
            # Where few passages ask anything, those held out must leave some to train on.
            others += bool(maker.of(place))
            if others >= wanted:
                break
            continue
        # A title asks for all of its document, which few documents of one passage can tell from the text. Readers are
        # trained and routers measured on these texts, so that the answers of labeled questions stay in them.
        whole = maker.passages[place].text
        needed = [answer for answer in answers.get(place, ()) if _says(whole, answer)]
        pairs = [pair for pair in maker.of(place) if pair.kind != "title"]
        if pairs := [pair for pair in pairs if all(_says(pair.text, answer) for answer in needed)]:
            pair = pick.choice(pairs)
            text = None if pair.text == whole else pair.text
            measured.append(Asked(pair.query, pair.kind, (place,), text))
    if others < len(measured):
        asking = len(measured) + others
        if settings.held_out is not None and asking > 1:
            most = asking // 2
            raise SettingError("held_out", "{} {}: of {} passages that can ask at most {}", wanted, asking, most)
        measured = measured[: max(asking // 5, 1)] if asking > 1 else []
    if not measured:
        raise TrainingError(
            f"the documents are too short to make questions of, or their words do not stand apart: of {count} passages "
            "fewer than two have several words, with a sentence or two rarer words among them; bring running text"
        )
    kept = set(pick.sample(range(len(labeled)), min(MOST_HELD_OUT, len(labeled) // 5)))
    measured += [item for number, item in enumerate(labeled) if number in kept]
    return [item for number, item in enumerate(labeled) if number not in kept], measured


def _digest(documents: Mapping[str, str], questions: Sequence[Question]) -> str:
    data = json.dumps([list(documents.items()), list(questions)], sort_keys=True)
    return hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()


def _checkpoint_to_resume(settings: RouterSettings, output: Path, record: Mapping[str, object]) -> JsonObject | None:
    path = output / CHECKPOINT_FILE
    if not settings.resume:
        if path.exists():
            raise SettingError(
                "output",
                "{} {}: holds an interrupted run; go on with --resume, or give another directory",
                output,
            )
        return None
    if not path.exists():
        raise SettingError("resume", "{}: {} holds no checkpoint of an interrupted run", output)
    try:
        before = json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
        loaded: JsonObject = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file raises
        raise SettingError("resume", "{}: {} cannot be read ({})", path, error) from None
    for name, value in record.items():
        if before.get(name) != value:
            if name in ("data", "protocol"):
                other = "other documents or questions" if name == "data" else "another protocol"
                raise SettingError("resume", "{}: the interrupted run had " + other)
            raise SettingError(name, "{} is {}, but was {} in the interrupted run", value, before.get(name))
    return loaded

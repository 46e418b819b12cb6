"""The agreement of processes on a forward, before they exchange anything of its layers.

Every process sends a message of the hosts where the forward begins, and looks at those of the others only where it
first needs them: in the first memory layer, while the device works on what lies below.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...model.document_rows_msa import DocumentRows
from ...model.routing_msa import SCORINGS, RoutingRequest, Scoring
from .collectives import Collectives
from .share import Share

# What processes tell each other before a forward, in this order.
FLAGS, SIZES = ("active", "all_scores", "forced"), ("batch", "tokens", "heads", "k", "columns")
REDUCTIONS = ("heads", "tokens", "chunks")
HEADER = (*FLAGS, *SIZES, *(f"reduce_{name}" for name in REDUCTIONS), "inputs")
SAME = "same"
DIFFERENT = "different"

Header = dict[str, int]


def header_of(request: RoutingRequest, mask: Tensor) -> Header:
    """The message of a process about its forward; `mask` is its routing mask on the CPU."""
    digest, forced, scoring = hashlib.sha256(), request.documents, request.scoring
    for tensor in (request.inputs, mask, forced):
        if tensor is not None and not tensor.is_floating_point():  # embeddings may differ in their last digits
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return {
        "active": 1,
        "batch": mask.shape[0],
        "tokens": int(mask.sum(1).max()),
        "heads": request.heads,
        "k": request.k,
        "all_scores": int(request.all_scores or (forced is None and not scoring.has_operation)),
        "forced": int(forced is not None),
        "columns": max(request.k, 0 if forced is None else forced.shape[1]),
        **{f"reduce_{name}": list(SCORINGS[name]).index(vars(scoring)[name]) for name in REDUCTIONS},
        "inputs": int.from_bytes(digest.digest()[:7], "little"),
    }


def check_headers(headers: list[Header], together: bool) -> None:
    """Make sure that what processes want fits together.

    Args:
        headers: of all processes.
        together: all of them give the model the same inputs.

    Raises:
        ValueError: in all processes, where it does not.
    """
    asking = [header for header in headers if header["active"]]
    for name in ("heads", "k", *(f"reduce_{name}" for name in REDUCTIONS)):
        if len({header[name] for header in asking}) > 1:
            raise ValueError(
                f"Processes that share a memory must run the same model; their `{name}` are "
                f"{[header[name] for header in headers]}."
            )
    if together and any(header != headers[0] for header in headers):
        shapes = [(header["batch"], header["tokens"]) if header["active"] else "finished" for header in headers]
        raise ValueError(
            'With `inputs="same"` all processes must give a model the same inputs in the same order; now they '
            f"differ (samples and routing tokens of each: {shapes}). Seed sampling alike, or share the bank with "
            'inputs="different".'
        )


@dataclass(frozen=True)
class Sizes:
    """The sizes of what is exchanged in a layer, the same in all processes.

    Attributes:
        batch: samples that every process has room for.
        tokens: routing tokens of a sample.
        columns: documents of a sample.
        k: documents that a sample chooses.
        heads: query heads.
        all_scores: the scores of all documents are exchanged.
        routes: some process chooses documents.
        forces: for each process, whether it was given documents.
        reductions: of the model that asks.
    """

    batch: int
    tokens: int
    columns: int
    k: int
    heads: int
    all_scores: bool
    routes: bool
    forces: list[bool]
    reductions: dict[str, str]

    @classmethod
    def of(cls, headers: list[Header]) -> Sizes:
        """Those of processes, of which at least one asks."""
        asking = [header for header in headers if header["active"]]
        batch, tokens, columns = (max(row[name] for row in headers) for name in ("batch", "tokens", "columns"))
        return cls(
            batch,
            tokens,
            columns,
            asking[0]["k"],
            asking[0]["heads"],
            any(row["all_scores"] for row in headers),
            any(not row["forced"] for row in asking),
            [bool(row["forced"]) for row in headers],
            {name: list(SCORINGS[name])[asking[0][f"reduce_{name}"]] for name in REDUCTIONS},
        )

    def scoring(self, similarity: str) -> Scoring:
        """That of the model that asks."""
        return Scoring(similarity, **self.reductions)


@dataclass(frozen=True)
class Given:
    """Documents that samples of a forward are given, in place of those that they would choose.

    Attributes:
        documents: [S, n] int64, of the samples of all processes; -1 for none.
        forces: [S, 1] bool, samples that do not choose.
        places: [S, n] int64, places of `documents` among the distinct ones, which are ascending; -1 for none.
        counts: [W], how many of the distinct ones lie in each process, one after the other.
        here: those that lie in this process, for every sample.
    """

    documents: Tensor
    forces: Tensor
    places: Tensor
    counts: np.ndarray
    here: DocumentRows

    @classmethod
    def of(cls, documents: Tensor, forces: list[bool], share: Share) -> Given:
        """Those of `documents` [S, n] on the CPU, of samples of which some `forces` [S]."""
        places = DocumentRows(documents, share.offsets)
        distinct, rows = torch.tensor(places.distinct, dtype=torch.int64), share.own_rows
        here = distinct[(distinct >= rows.start) & (distinct < rows.stop)] - rows.start
        return cls(
            documents,
            torch.tensor(forces, dtype=torch.bool)[:, None],
            places.documents,
            np.diff(np.searchsorted(distinct.numpy(), share.rows)),
            DocumentRows(here.expand(documents.shape[0], -1), share.local_offsets(torch.device("cpu"))),
        )


@dataclass(frozen=True)
class Masks:
    """The routing tokens of all processes, packed.

    Attributes:
        order: [B, t] int64 on the CPU, the places of this process' tokens, those that route first; None where it has
            none.
        routes: [W * B, t] bool on the CPU, which of the packed tokens are there.
    """

    order: Tensor | None
    routes: Tensor

    @classmethod
    def exchanged(cls, mask: Tensor | None, sizes: Sizes, ranks: Collectives) -> Masks:
        """Those that all processes tell each other; `mask` [b, T] is this process', None where it only serves."""
        valid, order = torch.zeros(sizes.batch, sizes.tokens, dtype=torch.bool), None
        if mask is not None:
            order = (~mask).long().argsort(dim=1, stable=True)[:, : sizes.tokens]
            valid[: mask.shape[0], : order.shape[1]] = mask.gather(1, order)
        return cls(order, ranks.gather(valid).flatten(0, 1))

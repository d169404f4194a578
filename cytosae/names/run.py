"""Names for latents (`cyto concept describe`): items, answers of others, and a test of every name.

    items      a contact sheet, statistics and a question for each latent: items.py; which images: choose.py
    answers    of a command (ask.py, calls.py), of tables and reviews (answers.py); all in a journal beside the items
    tests      a judge tells active from inactive images that no item shows, by the name alone: detection.py, scores.py

Items never change once they are complete; names and scores are added to the same folder and made again from the
journals. Nothing leaves the machine but what the user's own command sends.
"""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cytosae.barcodes import IMAGE_COLUMNS
from cytosae.concepts import read_selection
from cytosae.maps import Places, Sources, as_sources, require_same_sae
from cytosae.stage_one import StageOne
from stores.barcode_store import BarcodeStore
from stores.concept_store import ConceptStore
from stores.destination import claimed
from stores.errors import BadInput, DamagedStore, SpecMismatch
from stores.files import read_json, read_lines, read_regular, write_atomic
from stores.machine import n_cores
from stores.progress import Progress
from stores.result_folder import ResultStore, ResultWriter, begin_results
from stores.spec import NAMES
from stores.tables import csv_bytes, sealed_parquet

from .activations import BLOCK, blocks_of_latents, means_of_images, read_activations
from .answers import (
    COMMAND,
    ITEM,
    KEY,
    Answer,
    Unfit,
    answer_of,
    current,
    default_answers,
    journal_file,
    keep,
    now,
    read_answers,
    read_table,
    source_name,
)
from .ask import Answerer, Function, answerer
from .calls import Call, Tally, ask_all
from .choose import SHOWN, SIDES, TEST, Images, choose_images, divide_images
from .config import AskConfig, DescribeConfig
from .detection import (
    Scores,
    Task,
    batches,
    detection_file,
    detection_rows,
    keep_scores,
    missing,
    read_scores,
    request_of,
    scores_of,
    shuffled_names,
)
from .items import item_files, read_picture, write_items
from .read import (
    DETECTION_COLUMNS,
    DETECTION_FILE,
    NAME_COLUMNS,
    NAMES_FILE,
    SOURCE_COLUMNS,
    SOURCES_FILE,
    read_added,
)
from .report import Asked, DescribePlan, DescribeResult, asked_of, names_by_source

TEMPLATE = "answers.csv"
_IMAGES = {
    "latent": pa.int64(),
    "side": pa.string(),  # shown, or test
    "number": pa.int64(),  # on the sheet, or in the order of the test
    "row": pa.string(),  # strong, weaker, not active
    "image_id": pa.string(),
    "image_index": pa.int64(),  # over all latent stores
    "patient_group": pa.int64(),  # images of one patient, and identical images, have one number
    "activation": pa.float32(),  # mean over the tokens of the barcodes
    "matched_by": pa.string(),  # of an inactive image: what it has in common with an active one
}
_LATENTS = {
    "latent": pa.int64(),
    "has_item": pa.bool_(),
    "n_active_shown": pa.int64(),  # images with the latent on the side that is shown
    "n_active_test": pa.int64(),
    "reason": pa.string(),  # there is no test
}
_SPLIT = {"image_id": pa.string(), "patient_group": pa.int64(), "side": pa.string()}
# on one core, as bench/describe.py measures them: docs/benchmarks.md
_NONZEROS_PER_SECOND = 2.5e7
_SECONDS_PER_ITEM = 0.3
_SAE = "sae_sha256"


def plan_describe(
    barcodes: Path | str,
    concepts: ConceptStore | Path | str,
    config: DescribeConfig | None = None,
    ask: AskConfig | None = None,
    *,
    latents: Sequence[int] = (),
    selected: bool = False,
    command: str | Function | None = None,
    judge: str | Function | None = None,
) -> DescribePlan:
    """What `describe_latents` will take, from headers and small tables alone; errors as there."""
    config, ask = config or DescribeConfig(), ask or AskConfig()
    store, of = BarcodeStore(barcodes), _as_concepts(concepts)
    chosen = _chosen(of, latents, selected)
    reader = means_of_images(store, store.taus[0])
    blocks = blocks_of_latents(chosen, _n_active(store))
    held = max((int(_n_active(store)[block].sum()) for block in blocks), default=0)
    per_test = -(-2 * config.n_test // ask.batch)
    return DescribePlan(
        n_latents=len(chosen),
        n_nonzeros=reader.nnz,
        n_passes=len(blocks),
        seconds=len(blocks) * reader.nnz / _NONZEROS_PER_SECOND + len(chosen) * _SECONDS_PER_ITEM,
        memory_bytes=int(
            5e8 + 32 * BLOCK * n_cores() + 48 * held + 400 * reader.shape[0] + 200 * len(chosen) * (4 * config.n_shown)
        ),
        n_name_calls=len(chosen) if command else 0,
        n_judge_calls=len(chosen) * (1 + ask.shuffles) * per_test if judge else 0,
        timeout=ask.timeout,
    )


def describe_latents(
    barcodes: Path | str,
    concepts: ConceptStore | Path | str,
    stores: Sources | Places,
    out: Path | str,
    config: DescribeConfig | None = None,
    ask: AskConfig | None = None,
    *,
    latents: Sequence[int] = (),
    selected: bool = False,
    command: str | Function | None = None,
    by: str | None = None,
    answers: Sequence[Path | str] = (),
    judge: str | Function | None = None,
    judge_by: str | None = None,
    stage_one: StageOne | None = None,
    roots: Sequence[Path | str] = (),
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> DescribeResult:
    """Write an item for each latent, take names from others, and test them; repeat it to add sources.

    Into `out`: items/latent<N>.png and .json, images.parquet, latents.parquet, split.parquet and answers.csv (to be
    filled in); and, added later, names.parquet, detection.parquet and sources.parquet. The answers themselves lie
    beside it, in `out`.answers, and stay when the items are made again. A call that was answered is not made again.

    Parameters
    ----------
    barcodes, concepts, stores : of the same latents; the barcodes' mean activations say which images are active
    latents : each has an item
    selected : also those of `select_latents`
    command : a command line that gives names (a JSON request on stdin, a JSON answer on stdout), or a function from one
        to the other
    by : who gives these names, and those of tables that do not say it; None: the program's name
    answers : tables with names, .csv, .parquet or .json: of a colleague, or of `write_verdicts`
    judge : a command line or function that tests all names, of all sources; it may be `command`
    judge_by : who tests; None: the program's name
    stage_one : `cytocache.bridge`, which reads the images
    roots : folder of the images of each store; none: as recorded when the caches were made

    Raises
    ------
    BadInput
        If there is no latent or no such one, a table cannot be read, or there is no such program.
    SpecMismatch
        If the stores do not belong together, or `out` holds something else.
    DamagedStore
        If a store or a journal is damaged.
    """
    config, ask, out = config or DescribeConfig(), ask or AskConfig(), Path(out)
    concepts, sources = _as_concepts(concepts), as_sources(stores, stage_one, roots)
    store = BarcodeStore(barcodes)
    _require_one_origin(store, concepts, sources)
    chosen = _chosen(concepts, latents, selected)
    commands = [None if given is None else answerer(given, ask) for given in (command, judge)]
    namer, tester = _source(by, commands[0], "by"), _source(judge_by, commands[1], "judge_by")
    spec = {
        "concepts": concepts.identity,
        "barcodes": store.header.identity,
        "latents": sources.identities,
        _SAE: sources.stores[0].spec.sae_sha256,
        "chosen": chosen,
        **asdict(config),
    }
    inputs = [store.root, concepts.root, *sources.places]
    writer = begin_results(
        out, NAMES, spec, overwrite=overwrite, inputs=inputs, packages=("numpy", "scipy", "pillow", "anndata")
    )
    writer.watch(store.header, concepts.header, *sources.headers)
    was_complete = writer.is_complete
    if not was_complete:
        _write_all_items(writer, store, concepts, sources, chosen, config, progress)
    folder = default_answers(out)
    with claimed(folder):
        work = _Work(ResultStore(out, NAMES), folder, sources, ask, progress)
        unfit = work.take_tables([Path(each) for each in answers], given_by=by, concepts=concepts.identity)
        asked: list[Asked] = []
        if commands[0] is not None:
            asked.append(asked_of("names", namer, work.ask_names(commands[0], namer)))
        if commands[1] is not None and not any(each.gave_up for each in asked):
            asked.append(asked_of("scores", tester, work.ask_judge(commands[1], tester)))
        found = work.write_tables(tester if commands[1] is not None else None)
    summary = dict(work.items.header.summary or {})
    first = next((latent for latent in chosen if item_files(work.items.root, latent)[0].is_file()), None)
    return DescribeResult(
        out=out,
        n_items=int(summary["n_items"]),
        n_without_item=int(summary["n_without_item"]),
        n_testable=int(summary["n_testable"]),
        n_patients=int(summary["n_patients"]),
        **found,
        asked=tuple(asked),
        unfit=tuple(unfit),
        doubts=tuple(summary["doubts"]),
        unseen=tuple(summary["unseen"]),
        first_sheet=None if first is None else f"items/latent{first}.png",
        was_complete=was_complete,
    )


def _as_concepts(concepts: ConceptStore | Path | str) -> ConceptStore:
    return concepts if isinstance(concepts, ConceptStore) else ConceptStore(Path(concepts))


def _chosen(concepts: ConceptStore, latents: Sequence[int], selected: bool) -> list[int]:
    found = list(dict.fromkeys((*latents, *(read_selection(concepts).latents if selected else ()))))
    if not found:
        raise BadInput("no latent to name; name some with --latent, or draw a sample: cyto concept select, --selected")
    for latent in found:
        concepts.check_latent(latent)
    return found


def _source(given: str | None, command: Answerer | None, option: str) -> str:
    try:
        return source_name(given if given is not None else "?" if command is None else command.name)
    except Unfit as error:
        raise BadInput(
            f"--{option.replace('_', '-')} must be one printable line of at most 80 letters: {error}"
        ) from None


def _require_one_origin(store: BarcodeStore, concepts: ConceptStore, sources: Sources) -> None:
    """All three must be of the same latent stores in the same order, since images are known by their number."""
    require_same_sae(concepts, sources)
    for root, header in ((concepts.root, concepts.header), (store.root, store.header)):
        stated = header.spec.get("latents")
        if ([stated] if isinstance(stated, str) else stated) != sources.identities:
            raise SpecMismatch(
                f"{root} was made from other latents than {', '.join(str(each.root) for each in sources.stores)}; give "
                f"--latents once for each store that it was made from, in the same order"
            )


def _n_active(store: BarcodeStore) -> Any:
    """(n_latents,) images in which each latent is active."""
    latents = store.read_element("image", "var", store.taus[0])
    if "n_active_images" not in latents.columns:
        raise DamagedStore(f"{store.path('image', store.taus[0])} has no column n_active_images; count again")
    return latents["n_active_images"].to_numpy(np.int64)


# --------------------------------------------------------------------------------------------------------- items


def _write_all_items(
    writer: ResultWriter,
    store: BarcodeStore,
    concepts: ConceptStore,
    sources: Sources,
    chosen: Sequence[int],
    config: DescribeConfig,
    progress: Progress,
) -> None:
    images = divide_images(store.read_obs("image", store.taus[0], needed=IMAGE_COLUMNS), config)
    reader = means_of_images(store, store.taus[0])
    if reader.shape[0] != len(images.ids) or len(images.ids) != sum(each.spec.n_images for each in sources.stores):
        raise DamagedStore(f"{store.root} has another number of images than its latents; count again with cyto barcode")
    known = _known(concepts, chosen)
    tables: list[pa.Table] = []
    about: list[dict[str, Any]] = []
    unseen: list[str] = []
    for block in blocks_of_latents(chosen, _n_active(store)):
        rows_of: dict[int, list[dict[str, Any]]] = {}
        facts_of: dict[int, dict[str, Any]] = {}
        for latent, active, values in read_activations(reader, block, progress):
            choice = choose_images(images, latent, active, values, known[latent], config)
            has_item = any(row["side"] == SIDES[SHOWN] for row in choice.rows)
            about.append(
                {"latent": latent, "has_item": has_item, "reason": choice.reason}
                | {"n_active_shown": choice.n_active, "n_active_test": choice.n_active_test}
            )
            if has_item:
                rows_of[latent] = choice.rows
                facts_of[latent] = _facts(images, active, values)
        unseen += write_items(writer.root, sources, images, rows_of, facts_of, config, progress)
        rows = [row for each in rows_of.values() for row in each]
        tables.append(pa.Table.from_pylist(rows, pa.schema(list(_IMAGES.items()))))
    table = pa.concat_tables(tables)
    writer.write_table("images", table)
    writer.write_table("latents", pa.Table.from_pylist(about, pa.schema(list(_LATENTS.items()))))
    split = {"image_id": images.ids, "patient_group": images.group, "side": [SIDES[n] for n in images.side.tolist()]}
    writer.write_table("split", pa.table(split, pa.schema(list(_SPLIT.items()))))
    write_atomic(writer.root / TEMPLATE, csv_bytes(_template(about, writer.header.identity)))
    is_test = np.array(table["side"].to_pylist()) == SIDES[TEST]
    n_testable = len(np.unique(table["latent"].to_numpy()[is_test]))
    n_items = sum(each["has_item"] for each in about)
    writer.finish(
        {
            "n_items": n_items,
            "n_without_item": len(about) - n_items,
            "n_testable": n_testable,
            "n_patients": images.n_patients,
            "doubts": [*images.doubts],
            "unseen": list(dict.fromkeys(unseen))[:100],
        }
    )


def _known(concepts: ConceptStore, chosen: Sequence[int]) -> dict[int, Any]:
    """latent -> the images that other pages show for it: the top images of the concepts."""
    table = concepts.all_top_images
    latent, image = (table[name].to_numpy() for name in ("latent", "image_index"))
    order = np.argsort(latent, kind="stable")
    wanted = np.array(chosen, np.int64)
    first, last = np.searchsorted(latent[order], wanted), np.searchsorted(latent[order], wanted, side="right")
    return {int(one): image[order[a:b]] for one, a, b in zip(wanted, first, last, strict=True)}


def _facts(images: Images, active: Any, values: Any) -> dict[str, Any]:
    """Statistics of a latent over the images of the shown side alone."""
    is_mine = images.side[active] == SHOWN
    n_side = int((images.side == SHOWN).sum())
    mine, strength = active[is_mine], values[is_mine]
    facts: dict[str, Any] = {"n_images": n_side, "n_images_active": len(mine)}
    facts["mean_activation_where_active"] = float(f"{float(strength.mean(dtype=np.float64)):.4g}") if len(mine) else 0.0
    if images.n_patients:
        facts["n_patients"] = len(np.unique(images.group[images.side == SHOWN]))
        facts["n_patients_active"] = len(np.unique(images.group[mine]))
    return facts


def _template(about: Sequence[dict[str, Any]], identity: str) -> pa.Table:
    """The table that a colleague fills in."""
    latents = [each["latent"] for each in about if each["has_item"]]
    empty = [""] * len(latents)
    sheets = [f"items/latent{latent}.png" for latent in latents]
    return pa.table(
        {"latent": latents, "sheet": sheets, "name": empty, "text": empty, "confidence": empty, "given_by": empty}
        | {"items": [identity[:KEY]] * len(latents)}
    )


# ------------------------------------------------------------------------------------------------- names and tests


class _Work:
    """Answers and scores for complete items; the journals are locked meanwhile."""

    def __init__(self, items: ResultStore, folder: Path, sources: Sources, ask: AskConfig, progress: Progress) -> None:
        self.items, self.folder, self.sources, self.ask, self.progress = items, folder, sources, ask, progress
        self.identity = items.header.identity
        about = items.table("latents").to_pylist()
        self.latents = [row["latent"] for row in about if row["has_item"]]
        self.reasons = {row["latent"]: row["reason"] for row in about}
        for path in (journal_file(folder), detection_file(folder)):
            read_lines(path, mend=True)  # an incomplete last line, from a crash, must not corrupt the next one
        self.tests: dict[int, list[dict[str, Any]]] = {}
        for row in items.table("images").to_pylist():
            if row["side"] == SIDES[TEST]:
                self.tests.setdefault(row["latent"], []).append(row)
        self.answers = read_answers(folder)

    def take_tables(self, paths: Sequence[Path], *, given_by: str | None, concepts: str) -> list[str]:
        """Add the names of tables to the journal; the rows that are not taken, with reasons."""
        unfit = []
        for path in paths:
            table = read_table(path, given_by=given_by, items=self.identity, concepts=concepts, latents=self.latents)
            unfit += table.unfit
            told = current(self.answers)
            for answer in table.answers:
                if told.get((answer.latent, answer.given_by)) != answer:
                    self._keep(answer)
                    told[answer.latent, answer.given_by] = answer
        return unfit

    def ask_names(self, command: Answerer, given_by: str) -> Tally:
        """Ask for the names of all items that this source has not answered."""
        told = current(self.answers)
        asked = [
            latent
            for latent in self.latents
            if (found := told.get((latent, given_by))) is None or found.items != self.identity
        ]

        def calls() -> Iterator[Call]:
            for latent in asked:

                def take(answer: dict[str, Any], latent: int = latent) -> None:
                    context: dict[str, Any] = {"given_by": given_by, "source": COMMAND, "given_at": now()}
                    self._keep(answer_of(answer, latent=latent, saw=ITEM, items=self.identity, **context))

                yield Call(self._name_request(latent), take)

        return self._ask_all(command, calls(), len(asked), "names")

    def ask_judge(self, command: Answerer, judge: str) -> Tally:
        """Have all current names tested, and the names of other latents on the same images."""
        known = read_scores(self.folder, self.identity, judge)
        named = self._named()
        others = self._others(named)
        tasks = {
            Task(answer.latent, name)
            for answer in named
            for name in (answer.name, *others[answer.given_by, answer.latent])
        }
        todo = [
            (task, some)
            for task in sorted(tasks, key=lambda task: (task.latent, task.name))
            for some in batches(missing(task, known, self.tests.get(task.latent, ())), self.ask.batch)
        ]

        def calls() -> Iterator[Call]:
            for task, rows in todo:
                seen = [(row["number"], read_picture(self.sources, row["image_index"], ())[0]) for row in rows]
                numbers = [number for number, picture in seen if picture is not None]
                if not numbers:
                    continue

                def take(answer: dict[str, Any], task: Task = task, numbers: list[int] = numbers) -> None:
                    scores = scores_of(answer, len(numbers))
                    keep_scores(self.folder, self.identity, judge, task, numbers, scores)

                yield Call(request_of(task, [picture for _, picture in seen if picture is not None]), take)

        return self._ask_all(command, calls(), len(todo), "tests")

    def write_tables(self, judge: str | None) -> dict[str, Any]:
        """Write names, scores and sources anew from the journals; scores of other judges stay. Facts for the report."""
        named = self._named()
        nothing = [each for each in current(self.answers).values() if not each.name]
        names = [
            {name: getattr(each, name) for name in NAME_COLUMNS}
            | {"saw": each.saw if each.items == self.identity else "elsewhere"}
            for each in named
        ]
        judges = {row["judge"] for row in read_added(self.items, DETECTION_FILE, DETECTION_COLUMNS)}
        others = self._others(named)
        rows: list[dict[str, Any]] = []
        sources: list[dict[str, Any]] = []
        for each in sorted(judges | ({judge} if judge else set())):
            known: dict[Task, Scores] = read_scores(self.folder, self.identity, each)
            more, means = detection_rows(named, others, self.tests, self.reasons, known, each, self.ask)
            rows += more
            sources += means
        for file, columns, found in (
            (NAMES_FILE, NAME_COLUMNS, names),
            (DETECTION_FILE, DETECTION_COLUMNS, rows),
            (SOURCES_FILE, SOURCE_COLUMNS, sources),
        ):
            path = self.items.root / file
            if found or path.exists():
                table = pa.Table.from_pylist(found, pa.schema(list(columns.items())))
                write_atomic(path, sealed_parquet(table, items=self.identity))
        return {"names": names_by_source(named), "n_nothing": len(nothing), "sources": sources, "rows": rows}

    def _named(self) -> list[Answer]:
        """The current answers that have a name, by latent, then by source."""
        known = {*self.latents}
        found = [each for each in current(self.answers).values() if each.name and each.latent in known]
        return sorted(found, key=lambda each: (each.latent, each.given_by))

    def _others(self, named: Sequence[Answer]) -> dict[tuple[str, int], list[str]]:
        """(given_by, latent) -> the names of other latents of this source that are tested on its images."""
        by_source: dict[str, list[Answer]] = {}
        for each in named:
            by_source.setdefault(each.given_by, []).append(each)
        return {
            (source, latent): names
            for source, answers in by_source.items()
            for latent, names in shuffled_names(answers, self.ask.shuffles, self.ask.seed).items()
        }

    def _keep(self, answer: Answer) -> None:
        keep(self.folder, [answer])
        self.answers.append(answer)

    def _name_request(self, latent: int) -> dict[str, Any]:
        sheet, about = item_files(self.items.root, latent)
        said = dict(read_json(about))
        picture = dict(said["picture"])
        picture |= {"path": str(sheet), "base64": base64.b64encode(read_regular(sheet, most_bytes=1 << 26)).decode()}
        return {"task": "name", **said, "picture": picture}

    def _ask_all(self, command: Answerer, calls: Iterator[Call], total: int, state: str) -> Tally:
        self.progress(0, total, state)
        return ask_all(
            command,
            calls,
            self.ask,
            lambda tally: self.progress(
                tally.n_answered + tally.n_failed,
                total,
                f"{state}, {tally.n_failed} failed" if tally.n_failed else state,
            ),
        )

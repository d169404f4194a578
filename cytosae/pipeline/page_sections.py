"""The sections of the report, each from the stores that it speaks of."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cytosae.barcodes import plot_patient_barcodes
from cytosae.baselines import difference_text, doubts_of
from cytosae.training import HealthRow, read_health
from stores.result_folder import ResultStore
from stores.tables import column
from stores.wording import counted, size_on_disk

from . import stages
from .cohort import counts_text, read_cohort
from .page_blocks import Block, Caveats, Facts, Figure, Files, Heading, Prose, Section, Table, Verdict, Verdicts
from .page_concepts import concept_section
from .page_inputs import RunFolder
from .page_pictures import figure_picture
from .plan import short_value, size_text
from .stages import stages_of

PATIENTS_PICTURE = "patients_by_latents.png"
_MOST_PATIENTS = 150  # of the picture
_MOST_COMPARISONS = 6  # with a picture
_MOST_LISTED = 10
_NONE = "\N{EN DASH}"


def make_sections(run: RunFolder) -> list[Section]:
    """All sections that the run allows; `run.short` and `run.numbers` are filled on the way."""
    made = [
        _input_section(run),
        _health_section(run),
        _versus_section(run),
        concept_section(run),
        _patient_section(run),
        _comparison_section(run),
        _probe_section(run),
        _stability_section(run),
        _settings_section(run),
        _files_section(run),
    ]
    return [each for each in made if each is not None]


# ------------------------------------------------------------------------------------------------- what went in


def _input_section(run: RunFolder) -> Section:
    section = Section(id="input", title="What went in, and what was left out")
    cache = run.cache
    if cache is None:
        section.blocks.append(Prose(text="There is no finished activation cache yet: no image has been read."))
        return section
    facts, images = read_cohort(cache.images), cache.images
    errors = [
        (str(path), str(error))
        for path, error in zip(column(images, "path"), column(images, "error"), strict=True)
        if error is not None
    ]
    n_read = facts.n_images - len(errors)
    spec = cache.spec
    rows = [
        ("images", f"{n_read:,} read" + (f", {len(errors):,} could not be read" if errors else ", all of the table")),
        ("from", str(run.recipe.images["source"])),
        ("datasets", counts_text(facts.datasets)),
        ("labels", counts_text(facts.labels) or "none"),
        ("patients", f"{facts.n_patients:,}" if facts.n_patients else "none known"),
        ("diseases", counts_text(facts.diseases, "patients") or "none known"),
        (
            "tokens",
            f"{spec.tokens_per_image} of each image, of width {spec.width}: {n_read * spec.tokens_per_image:,} in all",
        ),
        (
            "backbone",
            f"{spec.backbone}, block {spec.block} of {spec.n_blocks}"
            + ("" if spec.trained else ", UNTRAINED: random weights"),
        ),
    ]
    section.blocks.append(Facts(rows=rows))
    left_out = [(name, reason) for name, reason in run.left_out.items()]
    left_out += [(path, error) for path, error in errors[:_MOST_LISTED]]
    if len(errors) > _MOST_LISTED:
        left_out.append((f"{len(errors) - _MOST_LISTED:,} more images", "see images.parquet of the cache"))
    if n_nobody := facts.n_images - facts.n_with_patient:
        left_out.append((counted(n_nobody, "image"), "of nobody: no patient is named; they are in image barcodes only"))
    if n_unlabelled := facts.n_images - sum(facts.labels.values()):
        left_out.append(
            (counted(n_unlabelled, "image"), "without a label: they say nothing about what latents answer to")
        )
    if facts.n_without_disease:
        left_out.append((counted(facts.n_without_disease, "patient"), "without a disease: in no comparison"))
    if facts.other_columns:
        left_out.append((f"columns {', '.join(facts.other_columns[:8])}", "of the table: nothing was asked of them"))
    if left_out:
        section.blocks.append(Table(caption="Left out, and why", head=("what", "why"), rows=left_out, text=(1,)))
    caveats = []
    if not spec.trained:
        caveats.append(
            "The backbone is untrained. Everything below shows that the machinery works, and nothing about cells."
        )
    if facts.labels and not facts.n_patients:
        caveats.append(
            "No patients are known, so every image counts as independent. Cells of one smear are not: a column "
            "patient in the table (or another one, as group_by of a probe) makes the scores honest."
        )
    if caveats:
        section.blocks.append(Caveats(lines=caveats))
    patients = f" of {counted(facts.n_patients, 'patient')}" if facts.n_patients else ""
    diseases = f" with {counted(len(facts.diseases), 'disease')}" if facts.diseases else ""
    run.short.append(f"{n_read:,} images{patients}{diseases} were read.")
    run.numbers += [("images", f"{n_read:,}")]
    run.numbers += [("patients", f"{facts.n_patients:,}")] if facts.n_patients else []
    return section


# ------------------------------------------------------------------------------------------------------ the SAE


def _health_section(run: RunFolder) -> Section | None:
    header = run.sae
    if header is None:
        return None
    section = Section(id="health", title="The SAE, and whether it is fit")
    spec, summary = header.spec, header.summary or {}
    rows = [("latents", f"{spec['n_latents']:,} on tokens of width {spec['width']}, {spec['activation']}")]
    if "imported" in spec:
        rows.append(("origin", "imported: the file does not say which tokens it was trained on"))
    else:
        images = spec["images"]
        rows.append(
            (
                "trained on",
                f"{images['trained_on']:,} images, {summary.get('tokens', 0):,} tokens; {images['held_out']:,} "
                f"images were held out",
            )
        )
    held_out, final = summary.get("held_out"), summary.get("final")
    measured = held_out or final or {}
    where = "on held-out images" if held_out else "on the last batch"
    where += " of its own training" if run.recipe.uses_sae else ""
    for name, key in (("active latents per token (L0)", "l0"), ("explained variance", "explained_variance")):
        value = measured.get(key)
        if value is not None:
            rows.append((name, f"{value:.3g} {where}"))
            run.numbers.append(("L0" if key == "l0" else "variance explained", f"{value:.3g}"))
    section.blocks.append(Facts(rows=rows))
    verdicts = _verdicts(run)
    if verdicts:
        section.blocks.append(Verdicts(rows=verdicts))
        bad = [each.name for each in verdicts if each.mark == "bad"]
        run.short.append(
            f"The SAE has {spec['n_latents']:,} latents and is "
            + ("fit for barcodes." if not bad else f"NOT fit for barcodes: {', '.join(bad)} out of range.")
        )
    else:
        place = stages.sae_place(run.recipe, run.root)
        said = (
            f"Whether it is fit was not measured on these images: cyto sae eval {place} {stages.CACHE} --keep does, "
            f"then cyto report."
        )
        section.blocks.append(Prose(text=said))
    run.numbers.append(("latents", f"{spec['n_latents']:,}"))
    return section


def _verdicts(run: RunFolder) -> list[Verdict]:
    """The health on these images that was kept with the SAE; that of other images would say nothing of these."""
    summary = run.sae.summary if run.sae is not None else None
    if run.cache is None:
        return []
    sha256 = str((summary or {}).get("sae_sha256", ""))
    health = read_health(run.sae_folder, sae_sha256=sha256, cache_sha256=run.cache.content_sha256)
    if health is None:
        return []
    return [
        Verdict(name=row.name, mark=_mark(row), says=row.says, healthy=row.healthy, next=row.next)
        for row in health.rows
    ]


def _mark(row: HealthRow) -> str:
    if row.is_healthy is None:
        return "unknown"
    if row.is_healthy:
        return "good"
    return "bad" if row.is_needed else "better"


def _versus_section(run: RunFolder) -> Section | None:
    """What the SAE has more than baselines, if that was measured."""
    store = run.versus
    if store is None:
        return None
    said = dict((store.header.summary or {})["result"])
    section = Section(id="baselines", title="Has the SAE learnt more than a baseline?")
    saes, differences = store.table("saes").to_pylist(), store.table("differences").to_pylist()
    section.blocks.append(
        Table(
            caption=f"On {said['n_images']:,} {'held-out ' if said['is_held_out'] else ''}images",
            head=("", "latents", "L0", "dead", "variance explained", "label purity", "by chance"),
            rows=[
                (
                    "the SAE" if row is saes[0] else row["kind"],
                    f"{row['n_latents']:,}",
                    f"{row['l0']:.1f}",
                    f"{row['dead_share']:.1%}",
                    _number(row["explained_variance"], ".3f"),
                    _number(row["label_purity"], ".3f"),
                    _number(row["label_purity_by_chance"], ".3f"),
                )
                for row in saes
            ],
        )
    )
    by_metric = {
        metric: {row["baseline"]: row for row in differences if row["metric"] == metric and row["low"] is not None}
        for metric in ("explained_variance", "label_purity_above_chance")
    }
    explained, purity = by_metric.values()
    section.blocks.append(
        Table(
            caption=f"SAE minus baseline, with 95% intervals over {counted(said['n_groups'], said['unit'])}",
            head=("baseline", "variance explained", "label purity above chance"),
            rows=[
                (name, difference_text(row), difference_text(purity[name]) if name in purity else _NONE)
                for name, row in explained.items()
            ],
            text=(1, 2),
        )
    )
    if doubts := doubts_of(said, differences):
        section.blocks.append(Caveats(lines=doubts))
    n_better = sum(row["is_better"] for row in explained.values())
    run.short.append(f"The SAE explains more variance than {n_better} of {counted(len(explained), 'baseline')}.")
    return section


# --------------------------------------------------------------------------------------------------- patients


def _patient_section(run: RunFolder) -> Section | None:
    store = run.barcodes
    if store is None:
        return None
    summary = store.header.summary or {}
    section = Section(id="patients", title="Barcodes of patients")
    tau, shares, silent = (
        _listed(value) for value in (store.taus, summary.get("share_above_tau"), summary.get("n_silent_latents"))
    )
    for value, share, n_silent in zip(tau, shares, silent, strict=False):
        run.numbers.append(("tau", f"{value:g}"))
        n_latents = summary.get("n_latents", 0)
        section.blocks.append(
            Prose(
                text=f"A latent counts where it exceeds tau {value:g}: {share:.1%} of the stored activations do, and "
                f"{n_latents - n_silent:,} of {n_latents:,} latents somewhere. A barcode says at how many tokens of an "
                f"image each latent does, on average over the images of a patient."
            )
        )
    rule = store.header.spec.get("tau_rule")
    if isinstance(rule, dict) and rule.get("words"):
        section.blocks.append(Prose(text=f"How tau was chosen: {rule['words']}"))
    if len(shares) == 1 and shares[0] < 0.01:
        run.short.append(f"Almost nothing exceeds tau {tau[0]:g}: the barcodes are nearly empty.")
    patients = store.read("patient", store.taus[0])
    if patients.n_obs < 2:
        section.blocks.append(Prose(text="Fewer than two patients are known, so there is nothing to set side by side."))
        return section
    shown, note = _some_patients(patients)
    plot_patient_barcodes(shown, run.root / PATIENTS_PICTURE)
    section.blocks.append(
        Figure(
            picture=figure_picture((run.root / PATIENTS_PICTURE).read_bytes()),
            alt="A heat map: a row for each patient, a column for each latent, grouped by disease",
            caption=f"{shown.n_obs:,} patients by the latents that vary most between them, chosen without looking at "
            f"the disease; each column on its own scale. {note}Stripes that follow the disease are a beginning, not a "
            f"result: the comparisons below count the patients and say what is chance.",
            is_wide=True,
        )
    )
    return section


def _some_patients(patients: Any) -> tuple[Any, str]:
    """All patients; of many, an even share of each disease."""
    if patients.n_obs <= _MOST_PATIENTS:
        return patients, ""
    order = np.argsort(np.asarray(patients.obs["disease"], str), kind="stable")
    rows = np.sort(order[np.linspace(0, len(order) - 1, _MOST_PATIENTS).astype(int)])
    return patients[np.unique(rows)].copy(), f"{_MOST_PATIENTS} of {patients.n_obs:,} patients are drawn. "


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


# ------------------------------------------------------------------------------------------------ comparisons


def _comparison_section(run: RunFolder) -> Section | None:
    if not run.comparisons:
        return None
    section = Section(id="comparisons", title="What differs between diseases")
    section.blocks.append(
        Prose(
            text="The unit is the patient. p comes from sharing out the patients anew. q limits the share of false "
            "finds among those listed; p (max-T) the chance of a single one: without any difference, one study in "
            "twenty would have a latent at 0.05 or below."
        )
    )
    rows, sure = [], []
    for config, comparison in run.comparisons:
        found = comparison.summary
        a, b = found["a"], found["b"]
        n_sure = found["n_p_max_t_at_most_0.05"]
        rows.append(
            (
                f"{a['name']} against {b['name']}",
                f"{a['n_patients']:,} / {b['n_patients']:,}",
                f"{found['n_tested']:,}",
                f"{found['p_floor']:.2g}",
                f"{found['n_q_at_most_0.05']:,}",
                f"{n_sure:,}",
            )
        )
        if n_sure:
            sure.append(f"{config['a']} and {config['b']} ({n_sure:,})")
    section.blocks.append(
        Table(
            caption="Latents that differ",
            head=("groups", "patients", "tested", "least p", "q ≤ 0.05", "p (max-T) ≤ 0.05"),
            rows=rows,
        )
    )
    n = len(run.comparisons)
    run.short.append(
        f"{counted(n, 'comparison')} of diseases: "
        + (
            f"latents differ beyond chance (max-T) between {', '.join(sure[:4])}"
            f"{' and others' if len(sure) > 4 else ''}."
            if sure
            else "no latent differs beyond chance (max-T)."
        )
    )
    for number, (config, comparison) in enumerate(run.comparisons):
        section.blocks += _comparison_blocks(config, comparison, with_picture=number < _MOST_COMPARISONS)
    return section


def _comparison_blocks(config: dict[str, Any], comparison: Any, *, with_picture: bool) -> Iterator[Block]:
    found = comparison.summary
    a, b = str(found["a"]["name"]), str(found["b"]["name"])
    yield Heading(text=f"{a} against {b}")
    if with_picture:
        yield Figure(
            picture=figure_picture(comparison.results.content("scatter.png")),
            alt=f"Mean barcodes of {b} against {a}, a point for each latent",
            caption=f"{a} ({found['a']['n_patients']:,} patients) against {b} ({found['b']['n_patients']:,}): mean "
            f"barcodes, a point per latent; marked are the largest differences, which need not be beyond chance. "
            f"{found['n_tested']:,} latents tested, {found['n_permutations']:,} ways to share out the patients, no p "
            f"below {found['p_floor']:.2g}.",
        )
    rows = [
        (
            str(row["latent"]),
            a if group == "a" else b,
            _number(row["mean_a"]),
            _number(row["mean_b"]),
            _number(row["hedges_g"], ".2f"),
            f"{_number(row['hedges_g_low'], '.2f')} to {_number(row['hedges_g_high'], '.2f')}",
            _number(row["auc"], ".2f"),
            _number(row["p"]),
            _number(row["q"]),
            _number(row["p_max_t"]),
        )
        for group, best in comparison.supported(5).items()
        for row in best
    ]
    if rows:
        yield Table(
            caption=f"The best supported latents; A is {a}, B is {b}",
            head=("latent", "higher in", "mean A", "mean B", "g", "95% interval", "AUC", "p", "q", "p (max-T)"),
            rows=rows,
            text=(1,),
        )
    if found["warnings"]:
        yield Caveats(lines=[str(line) for line in found["warnings"]])


# --------------------------------------------------------------------------------------------------- probes


def _probe_section(run: RunFolder) -> Section | None:
    if not run.probes:
        return None
    section = Section(id="probes", title="What a barcode can tell about a patient or an image that no fit has seen")
    for config, store, scores in run.probes:
        section.blocks += _probe_blocks(config, store, scores)
        chance, best = scores["permutation"], scores["methods"]["barcode"]["weighted_f1"]["mean"]
        said = f"by chance {chance['weighted_f1']['mean']:.2f}, p = {chance['weighted_f1']['p']:.2g}" if chance else ""
        run.short.append(
            f"Barcodes tell the {scores['target']} of {scores['n_units']:,} {scores['level']}s with a weighted F1 of "
            f"{best:.2f}{f' ({said})' if said else ''}."
        )
    return section


def _probe_blocks(config: dict[str, Any], store: ResultStore, scores: dict[str, Any]) -> Iterator[Block]:
    classes = counts_text(scores["classes"])
    yield Heading(text=f"{scores['target']} of {scores['level']}s")
    yield Prose(
        text=f"The {scores['target']} of {scores['n_units']:,} {scores['level']}s in {scores['n_groups']:,} "
        f"independent groups ({classes}); {scores['folds']} folds that no group crosses, drawn "
        f"{counted(scores['repeats'], 'time')}."
    )
    chance = scores["permutation"]
    null = ""
    if chance:
        found = chance["weighted_f1"]
        null = (
            f" Grey: the same on shuffled labels ({chance['n']:,} times): {found['q05']:.2f} to {found['q95']:.2f}; "
            f"p = {found['p']:.2g}, no p can be below {chance['p_floor']:.2g}."
        )
    yield Figure(
        picture=figure_picture(store.content("curve.png")),
        alt="Weighted F1 against the threshold of mean activation, with the band of chance",
        caption=f"Weighted F1 if only latents above a mean activation are kept.{null}",
    )
    yield Table(
        caption="On the same folds",
        head=("method", "weighted F1", "95% interval", "AUROC", "barcode minus this"),
        rows=[
            (
                name.replace("_", " "),
                f"{found['weighted_f1']['mean']:.3f}",
                _interval(found["interval"]["weighted_f1"], within=(0.0, 1.0)),
                _number(found["auroc"], ".3f"),
                _paired(found.get("barcode_minus_this", {}).get("weighted_f1")),
            )
            for name, found in scores["methods"].items()
        ],
    )
    notes = [f"left out: {n:,} {what}" for what, n in scores["left_out"].items() if n]
    if scores["warnings"] or notes:
        yield Caveats(lines=[*map(str, scores["warnings"]), *notes])


def _stability_section(run: RunFolder) -> Section | None:
    store = run.stability
    if store is None:
        return None
    section = Section(id="stability", title="Does another seed find the same latents?")
    (pair,) = store.table("pairs").to_pylist()
    beyond = pair["share_above_null_p99"]
    section.blocks.append(
        Figure(
            picture=figure_picture(store.content("stability.png")),
            alt="How well latents of two SAEs match, beside what chance gives",
            caption=f"Each latent of one seed with its partner of the other, by the cosine of their directions: on "
            f"average {pair['mean_cosine']:.2f}, by chance {pair['null_mean_cosine']:.2f}; {beyond:.0%} match better "
            f"than 99% of what chance gives.",
        )
    )
    section.blocks.append(
        Caveats(lines=["A latent that only one seed finds may be real and rare, or an accident: do not name it yet."])
    )
    run.short.append(f"Another seed finds {beyond:.0%} of the latents again, beyond chance.")
    return section


# ---------------------------------------------------------------------------------------- settings and files


def _settings_section(run: RunFolder) -> Section:
    section = Section(id="settings", title="Settings, and why")
    sections = run.recipe.sections()
    rows = []
    for name, value in _flat(sections):
        rows.append((name, short_value(value), run.recipe.why.get(name, "")))
    reasons = [row for row in rows if row[2]]
    section.blocks.append(
        Table(caption="Chosen from the data, or asked for", head=("setting", "value", "why"), rows=reasons, text=(1, 2))
    )
    section.blocks.append(
        Prose(
            text="recipe.toml holds these and all others. Change a line there and type cyto run recipe.toml: what "
            "depends on the line is done again, and nothing else."
        )
    )
    return section


def _flat(sections: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, section in sections.items():
        if isinstance(section, dict) and name not in ("why", "left_out"):
            yield from ((f"{name}.{key}", value) for key, value in section.items() if value is not None)


_WHAT = {
    stages.CACHE: ("the tokens of every image", "cyto cache info"),
    stages.SAE_FOLDER: ("the SAE: weights and settings", "cyto sae info"),
    stages.LATENTS: ("the latents of every token", "cyto latents info"),
    stages.BARCODES: ("barcodes of images, patients and diseases; anndata.read_zarr opens them", "cyto barcode export"),
    stages.CONCEPTS: ("statistics and top images of every latent", "cyto concept top"),
    stages.SELECTION: ("latents drawn for an expert to look at", "cyto concept sheet --selected"),
    stages.ATLAS: ("web pages of latents, images, patients; open index.html", "cyto atlas serve"),
    stages.SECOND_SAE: ("the SAE of the second seed", "cyto sae info"),
    stages.STABILITY: ("how well the two seeds agree", "cyto concept stability"),
}


def _files_section(run: RunFolder) -> Section:
    section = Section(id="files", title="Where everything is")
    rows: list[tuple[str, str, str, str, str]] = []
    for stage in stages_of(run.recipe, run.root):
        place = run.root / stage.out
        if not place.exists() or stage.name in run.left_out:
            continue
        kind = stage.out.split("/")[0]
        what, command = _WHAT.get(stage.out, (f"{stage.name}: tables and figures", f"cyto {kind}"))
        link = f"{stage.out}/index.html" if stage.out == stages.ATLAS else ""
        rows.append((stage.out, link, what, size_text(_size(place)), command))
    rows += [
        (name, name if name.endswith((".png", ".html")) else "", what, "", command)
        for name, what, command in (
            ("recipe.toml", "every setting of this run", "cyto run recipe.toml"),
            ("commands.sh", "the same by hand, one command for each stage", "sh commands.sh"),
            (PATIENTS_PICTURE, "patients by latents, as above", "cyto report"),
            ("reference_images.png", "latents with their images, as above", "cyto report"),
        )
        if (run.root / name).is_file() or name == "commands.sh"
    ]
    section.blocks.append(Files(rows=rows))
    section.blocks.append(
        Prose(
            text="Paths are below the folder of this page. cyto verify DIR reads every byte of a store and says "
            "whether it is whole."
        )
    )
    return section


def _size(place: Path) -> int:
    """Bytes, without the run logs, which are no results."""
    if place.is_file():
        return place.stat().st_size
    return size_on_disk(place) - sum(path.stat().st_size for path in islice(place.rglob("runs*.jsonl"), 1000))


def _number(value: Any, form: str = ".3g") -> str:
    return _NONE if value is None or value != value else format(float(value), form)


def _interval(interval: dict[str, Any], *, within: tuple[float, float] = (-np.inf, np.inf)) -> str:
    """An interval, cut where no value can lie: it is made from a mean and a standard error."""
    if interval["low"] is None:
        return _NONE
    low, high = (min(max(interval[name], within[0]), within[1]) for name in ("low", "high"))
    return f"{low:.3f} to {high:.3f}"


def _paired(found: dict[str, Any] | None) -> str:
    if not found or found["difference"] is None:
        return _NONE
    return f"{found['difference']:+.3f} ({_interval(found)})"

"""What was published about the five datasets of the CytoSAE paper: classes, counts, known irregularities.

The images come from public archives (docs/datasets.md); these tables were not made from them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class CellClass:
    """A class as published. `common` is the name that all five datasets share: docs/datasets.md has the rule."""

    code: str  # the class folder; in Acevedo the prefix of the file name
    label: str
    common: str | None
    published: int  # images


@dataclass(frozen=True)
class Disease:
    """A group of patients of AML Hehr."""

    code: str  # the folder, `bag_label` in metadata.csv
    name: str
    published: int  # patients


# Counts per class: the MLL23 article's tables (MLL23, Acevedo, Matek19); DinoBloom's names and the numbers of the
# published files (BMC); Hehr et al. (AML Hehr).
MLL23 = (
    CellClass("basophil", "basophil", "basophil", 616),
    CellClass("eosinophil", "eosinophil", "eosinophil", 2448),
    CellClass("hairy_cell", "hairy_cell", "hairy_cell", 3265),
    CellClass("lymphocyte", "lymphocyte", "lymphocyte", 5532),
    CellClass("lymphocyte_large_granular", "lymphocyte_large_granular", "lymphocyte", 1849),
    CellClass("lymphocyte_neoplastic", "lymphocyte_neoplastic", "lymphocyte_atypical", 180),
    CellClass("lymphocyte_reactive", "lymphocyte_reactive", "lymphocyte_atypical", 33),
    CellClass("metamyelocyte", "metamyelocyte", "metamyelocyte", 483),
    CellClass("monocyte", "monocyte", "monocyte", 2510),
    CellClass("myeloblast", "myeloblast", "blast", 8606),
    CellClass("myelocyte", "myelocyte", "myelocyte", 747),
    CellClass("neutrophil_band", "neutrophil_band", "neutrophil_band", 687),
    CellClass("neutrophil_segmented", "neutrophil_segmented", "neutrophil_segmented", 7170),
    CellClass("normoblast", "normoblast", "erythroblast", 2071),
    CellClass("plasma_cell", "plasma_cell", "plasma_cell", 1658),
    CellClass("promyelocyte", "promyelocyte", "promyelocyte", 745),
    CellClass("promyelocyte_atypical", "promyelocyte_atypical", "promyelocyte_atypical", 2033),
    CellClass("smudge_cell", "smudge_cell", "smudge_cell", 988),
)
ACEVEDO = (
    CellClass("BA", "basophil", "basophil", 1218),
    CellClass("EO", "eosinophil", "eosinophil", 3117),
    CellClass("ERB", "erythroblast", "erythroblast", 1551),
    CellClass("IG", "immature_granulocyte", None, 151),
    CellClass("LY", "lymphocyte", "lymphocyte", 1214),
    CellClass("MMY", "metamyelocyte", "metamyelocyte", 1015),
    CellClass("MO", "monocyte", "monocyte", 1420),
    CellClass("MY", "myelocyte", "myelocyte", 1137),
    CellClass("NEUTROPHIL", "neutrophil", None, 50),
    CellClass("BNE", "neutrophil_band", "neutrophil_band", 1633),
    CellClass("SNE", "neutrophil_segmented", "neutrophil_segmented", 1646),
    CellClass("PLATELET", "platelet", None, 2348),
    CellClass("PMY", "promyelocyte", "promyelocyte", 592),
)
MATEK19 = (
    CellClass("BAS", "basophil", "basophil", 79),
    CellClass("EBO", "erythroblast", "erythroblast", 78),
    CellClass("EOS", "eosinophil", "eosinophil", 424),
    CellClass("KSC", "smudge cell", "smudge_cell", 15),
    CellClass("LYA", "lymphocyte (atypical)", "lymphocyte_atypical", 11),
    CellClass("LYT", "lymphocyte (typical)", "lymphocyte", 3937),
    CellClass("MMZ", "metamyelocyte", "metamyelocyte", 15),
    CellClass("MOB", "monoblast", "blast", 26),
    CellClass("MON", "monocyte", "monocyte", 1789),
    CellClass("MYB", "myelocyte", "myelocyte", 42),
    CellClass("MYO", "myeloblast", "blast", 3268),
    CellClass("NGB", "neutrophil (band)", "neutrophil_band", 109),
    CellClass("NGS", "neutrophil (segmented)", "neutrophil_segmented", 8484),
    CellClass("PMB", "promyelocyte (bilobed)", "promyelocyte_atypical", 18),
    CellClass("PMO", "promyelocyte", "promyelocyte", 70),
)
BMC = (
    CellClass("ABE", "abnormal eosinophil", "eosinophil", 8),
    CellClass("ART", "artefact", None, 19630),
    CellClass("BAS", "basophil", "basophil", 441),
    CellClass("BLA", "blast", "blast", 11973),
    CellClass("EBO", "erythroblast", "erythroblast", 27395),
    CellClass("EOS", "eosinophil", "eosinophil", 5883),
    CellClass("FGC", "faggot cell", "promyelocyte_atypical", 47),
    CellClass("HAC", "hairy cell", "hairy_cell", 409),
    CellClass("KSC", "smudge cell", "smudge_cell", 42),
    CellClass("LYI", "immature lymphocyte", None, 65),
    CellClass("LYT", "lymphocyte", "lymphocyte", 26242),
    CellClass("MMZ", "metamyelocyte", "metamyelocyte", 3055),
    CellClass("MON", "monocyte", "monocyte", 4040),
    CellClass("MYB", "myelocyte", "myelocyte", 6557),
    CellClass("NGB", "neutrophil (band)", "neutrophil_band", 9968),
    CellClass("NGS", "neutrophil (segmented)", "neutrophil_segmented", 29424),
    CellClass("NIF", "not identifiable", None, 3538),
    CellClass("OTH", "other", None, 294),
    CellClass("PEB", "proerythroblast", "erythroblast", 2740),
    CellClass("PLM", "plasma cell", "plasma_cell", 7629),
    CellClass("PMO", "promyelocyte", "promyelocyte", 11994),
)
AML_HEHR = (
    Disease("CBFB_MYH11", "CBFB::MYH11", 37),
    Disease("NPM1", "NPM1", 36),
    Disease("PML_RARA", "PML::RARA", 24),
    Disease("RUNX1_RUNX1T1", "RUNX1::RUNX1T1", 32),
    Disease("control", "control", 60),
)

# by name: the class codes that a set leaves out; the first of each dataset is its default
CLASS_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "mll23": {"18": ()},
    "acevedo": {"13": (), "11": ("IG", "NEUTROPHIL"), "10": ("IG", "NEUTROPHIL", "PLATELET")},
    "matek19": {"15": ()},
    "bmc": {"21": ()},
    "aml-hehr": {"5": ()},
}
# class folders: as published, and one per class as the released code's arrange_dataset.py leaves them
ACEVEDO_FOLDERS = {
    **{cell.label: (cell.code,) for cell in ACEVEDO if cell.code not in ("IG", "NEUTROPHIL")},
    "ig": ("MMY", "MY", "PMY", "IG"),
    "neutrophil": ("BNE", "SNE", "NEUTROPHIL"),
}
# the first is deleted by the released code, the others were dropped by later users of the dataset
BMC_BROKEN = (
    *("MYB_05527", "NGB_09454", "ART_07788", "EBO_06999", "BLA_09522", "NGS_04035"),
    *("NGS_18642", "NGS_15228", "LYT_19975", "EOS_02571"),
)

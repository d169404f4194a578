"""The version of Cyto, and what to install if a package of an extra is missing."""

VERSION = "0.1.0"  # pyproject.toml reads it here, tests compare CITATION.cff and CHANGELOG.md with it
DISTRIBUTION = "cytobarcode"  # the name for pip; `cyto` on the package index is another project


def missing_package(name: str, what: str = "this command") -> str:
    """One line for the user about a missing package of an extra; "" if no extra has it.

    name : of the module that could not be imported
    what : what needs it
    """
    package = name.split(".")[0]
    extra = {"torch": "torch", "torchvision": "torch", "timm": "torch", "obstore": "remote"}.get(package)
    if extra is None:
        return ""
    return f"{what} needs the package {package}; install it: pip install '{DISTRIBUTION}[{extra}]'"

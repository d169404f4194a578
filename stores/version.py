"""Which cyto this is, and what to install where a package of an extra is missing."""

VERSION = "0.1.0"  # pyproject.toml reads it here, tests compare CITATION.cff and CHANGELOG.md with it
DISTRIBUTION = "cytobarcode"  # its name for pip; `cyto` on the package index is somebody else's


def missing_package(name: str, what: str = "this command") -> str:
    """One line for a user about a package of an extra that is not installed; "" if no extra of ours brings it.

    name : of the module that could not be imported
    what : needs it
    """
    package = name.split(".")[0]
    extra = {"torch": "torch", "torchvision": "torch", "timm": "torch", "obstore": "remote"}.get(package)
    if extra is None:
        return ""
    return f"{what} needs the package {package}; install it: pip install '{DISTRIBUTION}[{extra}]'"

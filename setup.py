"""What setup.cfg cannot say: where the configs lie, and the README as a package page has it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

FILES = "https://github.com/mqa-jax/mqa_jax/blob/main/"
PICTURES = "https://raw.githubusercontent.com/mqa-jax/mqa_jax/main/"


def absolute_links(markdown: str) -> str:
    """With links that also lead somewhere from a page that has no files beside it."""

    def absolute(match: re.Match) -> str:
        text, path = match.groups()
        return f"{text}({PICTURES if text.startswith('!') else FILES}{path})"

    return re.sub(r"(!?\[[^\]]*\])\((?!https?:|#|mailto:)([^)\s]+)\)", absolute, markdown)


setup(
    packages=[*find_packages(include=["mqa_jax", "mqa_jax.*"]), "mqa_jax.configs"],
    package_dir={"mqa_jax.configs": "configs"},
    long_description=absolute_links((Path(__file__).parent / "README.md").read_text("utf-8")),
)

"""Offline HTML pages: templates of ours, in which every text is a stranger's and is escaped."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(package: str, template: str, **values: Any) -> str:
    """A template that lies in a package of ours. Raises jinja2's UndefinedError for a value that it lacks."""
    environment = Environment(
        loader=PackageLoader(package, package_path="."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)

"""Render the HTML templates of this folder."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.report import formatting

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # an identity named `<b>` stays text
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
FILTERS = ("compact", "fixed", "percent", "saving", "fewer", "times", "speedup", "interval", "threads")
ENVIRONMENT.filters.update({name: getattr(formatting, name) for name in FILTERS})


def render(template: str, **values: object) -> str:
    """Render a template of this folder; all values are HTML-escaped.

    Raises:
        jinja2.UndefinedError: If the template uses a variable that is not in `values`.
    """
    return ENVIRONMENT.get_template(template).render(values)

"""Where JavaScript is off, a slider shows the picture that it would begin with, and says so."""

import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

CAPTION = {
    "en": "Without JavaScript, this is the slider's first picture.",
    "zh": "未启用 JavaScript，此处显示滑块的第一张图。",
}


def setup(app: Sphinx) -> dict:
    app.connect("doctree-resolved", add_pictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def add_pictures(app: Sphinx, doctree: nodes.document, page: str) -> None:
    views = [raw for raw in doctree.findall(nodes.raw) if "widget-view+json" in raw.astext()]
    if not views:
        return
    book = json.loads(Path(app.env.doc2path(page)).read_text(encoding="utf-8"))
    models = book["metadata"]["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    for view in views:
        text = view.astext()
        model = json.loads(text[text.index("{") : text.rindex("}") + 1])["model_id"]
        if picture := first_picture(models, model):
            caption = CAPTION[Path(app.srcdir).name]
            still = f"<noscript><figure>{picture}<figcaption>{caption}</figcaption></figure></noscript>"
            view.parent.insert(view.parent.index(view) + 1, nodes.raw("", still, format="html"))


def first_picture(models: dict, name: str) -> str:
    """The picture that is visible at first in a widget or in what it holds; "" if it holds none."""
    state = models[name]["state"]
    if models[name]["model_name"] == "ImageModel":
        data = models[name]["buffers"][0]["data"]
        return f'<img src="data:image/{state["format"]};base64,{data}" alt="{state["tooltip"]}" />'
    children = [child.removeprefix("IPY_MODEL_") for child in state.get("children", [])]
    if (selected := state.get("selected_index")) is not None:
        children = [children[selected]]
    return next(filter(None, (first_picture(models, child) for child in children)), "")

// Draws the ipywidgets that a page has saved, with no kernel: sliders that choose among pictures drawn beforehand.
//
// A notebook stores its widgets as models: a kind ("SliderModel"), a state (trait -> value) and, for pictures, buffers. A jslink is a
// model as well, which joins a trait of one model to a trait of another. Drawn are the kinds in `drawings`, at the end; any other kind
// says so in its place.
addEventListener("DOMContentLoaded", () => {
  const saved = document.querySelector('script[type="application/vnd.jupyter.widget-state+json"]');
  if (!saved) return;
  const models = JSON.parse(saved.textContent).state;
  const listeners = {}; // "model trait" -> functions of the trait's new value

  const idOf = (reference) => reference.replace("IPY_MODEL_", "");

  // Call listener with the trait's value, now and whenever it changes.
  function watch(model, trait, listener) {
    (listeners[`${model} ${trait}`] ??= []).push(listener);
    listener(models[model].state[trait]);
  }

  function set(model, trait, value) {
    if (models[model].state[trait] === value) return; // else two linked traits would set each other for ever
    models[model].state[trait] = value;
    for (const listener of listeners[`${model} ${trait}`] ?? []) listener(value);
  }

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function draw(model) {
    const kind = models[model].model_name.replace("Model", "");
    const drawing = drawings[kind];
    return drawing ? drawing(model, models[model].state) : element("em", {}, `${kind}: needs a running notebook`);
  }

  const drawChildren = (state) => state.children.map((child) => draw(idOf(child)));

  // The browser's own slider: it has a label, follows mouse, finger and keyboard, and says its value to a screen reader.
  function slider(model, state, trait, range, textOf) {
    const input = element("input", { type: "range", ...range });
    const shown = element("output", {});
    input.addEventListener("input", () => set(model, trait, Number(input.value)));
    watch(model, trait, (value) => {
      input.value = value;
      input.ariaValueText = shown.value = textOf(value);
    });
    return element("label", { className: "widget-slider" }, element("span", {}, state.description), input, shown);
  }

  function intSlider(model, state) {
    return slider(model, state, "value", { min: state.min, max: state.max, step: state.step }, String);
  }

  function selectionSlider(model, state) {
    const labels = state._options_labels;
    return slider(model, state, "index", { min: 0, max: labels.length - 1 }, (index) => labels[index]);
  }

  function oneOfMany(model, state) {
    const children = drawChildren(state);
    watch(model, "selected_index", (selected) => {
      children.forEach((child, index) => (child.hidden = index !== selected));
    });
    return element("div", {}, ...children);
  }

  function image(model, state) {
    return element("img", { src: models[model].address, alt: state.tooltip ?? "" }); // book/ext/pack.py made a file of it
  }

  function link({ source, target }, bothWays) {
    const [from, fromTrait] = [idOf(source[0]), source[1]];
    const [to, toTrait] = [idOf(target[0]), target[1]];
    watch(from, fromTrait, (value) => set(to, toTrait, value));
    if (bothWays) watch(to, toTrait, (value) => set(from, fromTrait, value));
  }

  const drawings = {
    VBox: (model, state) => element("div", { className: "widget-column" }, ...drawChildren(state)),
    HBox: (model, state) => element("div", { className: "widget-row" }, ...drawChildren(state)),
    Label: (model, state) => element("span", {}, state.value),
    Image: image,
    IntSlider: intSlider,
    SelectionSlider: selectionSlider,
    Tab: oneOfMany,
    Stack: oneOfMany,
  };

  for (const { model_name, state } of Object.values(models)) {
    if (model_name === "LinkModel") link(state, true);
    if (model_name === "DirectionalLinkModel") link(state, false);
  }
  for (const view of document.querySelectorAll('script[type="application/vnd.jupyter.widget-view+json"]')) {
    view.replaceWith(draw(JSON.parse(view.textContent).model_id));
  }
});

// Advanced inputs of the pack's nodes out of sight on the canvas, where the frontend itself leaves them there.

import { app } from "../../scripts/app.js";
import { word } from "./ziplora_words.js";

const NO_ROOM = () => [0, -4]; // what a frontend that draws a widget no more still leaves for it, taken back

const isOurs = (node) => node.constructor?.nodeData?.category?.startsWith("ZipLoRA");

/** With a button, which the frontend does not have for it; in no file and in no queue. */
function hide(node, widgets) {
  const sizes = new Map(widgets.map((widget) => [widget, widget.computeSize]));
  const button = node.addWidget("button", "", null, () => node.toggleAdvanced(), { serialize: false });
  button.serialize = false;
  const update = () => {
    button.label = node.showAdvanced ? word("Fewer options") : word("More options");
    for (const [widget, size] of sizes) widget.computeSize = node.showAdvanced ? size : NO_ROOM;
  };
  const toggle = node.toggleAdvanced;
  node.toggleAdvanced = function () {
    const free = node.size[1] - node.computeSize()[1];
    toggle.apply(this);
    update();
    node.setSize([node.size[0], node.computeSize()[1] + Math.max(free, 0)]);
  };
  const configure = node.onConfigure;
  node.onConfigure = function (saved) {
    const answer = configure?.apply(this, arguments);
    node.showAdvanced = Boolean(saved?.showAdvanced);
    update();
    return answer;
  };
  for (const widget of widgets) widget.advanced = true;
  update();
  node.setSize([node.size[0], node.computeSize()[1]]);
}

app.registerExtension({
  name: "ziplora.advanced",
  nodeCreated(node) {
    if (!isOurs(node)) return;
    const left = node.widgets?.filter((widget) => widget.options?.advanced && !widget.advanced) ?? [];
    if (left.length && node.toggleAdvanced) hide(node, left);
  },
});

// A title color for each group of the pack's nodes, on nodes that are new: what a file or a user says stays.

import { app } from "../../scripts/app.js";

// By category; the names are those of the frontend's own menu of colors.
const COLORS = {
  ZipLoRA: "blue",
  "ZipLoRA/train": "green",
  "ZipLoRA/files": "brown",
  "ZipLoRA/compare": "purple",
};

app.registerExtension({
  name: "ziplora.colors",
  nodeCreated(node) {
    const name = COLORS[node.constructor?.nodeData?.category];
    const color = window.LGraphCanvas?.node_colors?.[name]?.color;
    if (!color || node.color) return;
    node.color = color;
    const configure = node.onConfigure;
    node.onConfigure = function (saved) {
      if (saved && !saved.color) delete this.color; // saved without one
      return configure?.apply(this, arguments);
    };
  },
});

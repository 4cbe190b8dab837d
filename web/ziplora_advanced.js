// Advanced widgets of the pack's nodes, out of sight until they are asked for or connected. Sockets stay as they are:
// links are saved by their places.

import { app } from "../../scripts/app.js";
import { word } from "./ziplora_words.js";

// Known to frontends whose newer renderer leaves advanced widgets away by itself, with a button of its own.
const ALWAYS = "Comfy.Node.AlwaysShowAdvancedWidgets";
const NO_ROOM = () => [0, -4]; // what a frontend that draws a widget no more still leaves for it, taken back

const isOurs = (node) => node.constructor?.nodeData?.category?.startsWith("ZipLoRA");

const setting = (id) => app.extensionManager?.setting?.get?.(id);

const words = () => ({ more: word("More options"), fewer: word("Fewer options") });

/** Where an object or what it inherits from says how a property is read and written. */
function described(object, name) {
  for (let at = object; at; at = Object.getPrototypeOf(at)) {
    const found = Object.getOwnPropertyDescriptor(at, name);
    if (found) return found;
  }
}

/** Calls something after a method of a node, which need not be there. */
function after(node, name, then) {
  const own = node[name];
  node[name] = function (...values) {
    const answer = own?.apply(this, values);
    then.apply(this, values);
    return answer;
  };
}

class Advanced {
  constructor(node, widgets) {
    this.node = node;
    this.sizes = new Map(widgets.map((widget) => [widget, widget.computeSize]));
    this.isNative = setting(ALWAYS) !== undefined;
    this.isConfiguring = false;
  }

  get isOpen() {
    return Boolean(this.node.showAdvanced);
  }

  isLinked(widget) {
    const place = this.node.inputs?.findIndex((input) => input.widget?.name === widget.name) ?? -1;
    return place >= 0 && this.node.isInputConnected(place);
  }

  show() {
    for (const [widget, size] of this.sizes) {
      const isLinked = this.isLinked(widget);
      widget.advanced = !isLinked;
      widget.computeSize = this.isOpen || isLinked ? size : NO_ROOM;
      if (!this.isNative) widget.options.hidden = !(this.isOpen || isLinked);
    }
    this.button.label = this.button.options.label = words()[this.isOpen ? "fewer" : "more"]; // by canvas, by Vue
    this.refresh();
  }

  /** Nodes that Vue draws look at their widgets again, where it does not see by itself which are advanced. */
  refresh() {
    const { graph } = this.node;
    if (this.isNative || !graph || app.configuringGraph || !window.LiteGraph?.vueNodesMode) return;
    graph.onNodeAdded?.(this.node);
  }

  /** The room that was free on the node stays free. */
  opened(open) {
    const { node } = this;
    const free = Math.max(node.size[1] - node.computeSize()[1], 0);
    open();
    if (this.isConfiguring) return;
    this.show();
    node.setSize([node.size[0], Math.round(node.computeSize()[1] + free)]);
  }

  watch() {
    const { node } = this;
    const own = described(node, "showAdvanced");
    let value = node.showAdvanced;
    Object.defineProperty(node, "showAdvanced", {
      configurable: true,
      enumerable: true,
      get: () => (own?.get ? own.get.call(node) : value),
      set: (is) => this.opened(() => (own?.set ? own.set.call(node, is) : (value = is))),
    });
    const configure = node.configure;
    node.configure = (...saved) => {
      this.isConfiguring = true;
      try {
        return configure.apply(node, saved);
      } finally {
        this.isConfiguring = false;
        this.show();
      }
    };
    after(node, "onAfterGraphConfigured", () => this.show()); // some frontends know links only then
  }

  /** In no file and in no queue; where the newer renderer has a button of its own, on the canvas alone. */
  addButton() {
    const press = () => (this.node.showAdvanced = !this.isOpen);
    this.button = this.node.addWidget("button", "", null, press, { serialize: false, canvasOnly: this.isNative });
    this.button.serialize = false;
  }
}

app.registerExtension({
  name: "ziplora.advanced",
  nodeCreated(node) {
    if (!isOurs(node) || setting(ALWAYS)) return;
    const widgets = node.widgets?.filter((widget) => widget.options?.advanced) ?? [];
    if (!widgets.length) return;
    const hidden = new Advanced(node, widgets);
    hidden.addButton();
    hidden.watch();
    hidden.show();
    node.setSize([node.size[0], node.computeSize()[1]]);
  },
});

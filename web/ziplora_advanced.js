// Advanced inputs of the pack's nodes, widgets and sockets, out of sight until they are asked for or connected.

import { app } from "../../scripts/app.js";
import { word } from "./ziplora_words.js";

// Known to frontends whose newer renderer leaves advanced widgets away by itself, with a button of its own.
const ALWAYS = "Comfy.Node.AlwaysShowAdvancedWidgets";
const INPUT = 1; // litegraph's number for that side of a node
const NO_ROOM = () => [0, -4]; // what a frontend that draws a widget no more still leaves for it, taken back
const LET_GO = 500; // milliseconds between looks at whether a link is still being dragged

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
  constructor(node, widgets, sockets) {
    this.node = node;
    this.sizes = new Map(widgets.map((widget) => [widget, widget.computeSize]));
    this.sockets = sockets;
    this.first = [...(node.inputs ?? [])]; // as the frontend made them, in their order
    this.isNative = setting(ALWAYS) !== undefined;
    this.isConfiguring = false;
  }

  get isOpen() {
    return Boolean(this.node.showAdvanced);
  }

  isLinked(which) {
    const place = this.node.inputs.findIndex(which);
    return place >= 0 && this.node.isInputConnected(place);
  }

  /** Sockets that are not on the node now. */
  away() {
    return this.sockets.filter(({ name }) => !this.node.inputs.some((input) => input.name === name));
  }

  putBack(sockets) {
    for (const { name, type, ...more } of sockets) this.node.addInput(name, type, more);
  }

  /** The sockets that nothing is connected to taken off; a file that is opened by other means has them all again. */
  takeAway() {
    for (const { name } of this.sockets) {
      const isIt = (input) => input.name === name;
      if (!this.isLinked(isIt)) {
        const place = this.node.inputs.findIndex(isIt);
        if (place >= 0) this.node.removeInput(place);
      }
    }
  }

  settle() {
    for (const [widget, size] of this.sizes) {
      const isLinked = this.isLinked((input) => input.widget?.name === widget.name);
      widget.advanced = !isLinked;
      widget.computeSize = this.isOpen || isLinked ? size : NO_ROOM;
      if (!this.isNative) widget.options.hidden = !(this.isOpen || isLinked);
    }
    if (this.isOpen) this.putBack(this.away());
    else this.takeAway();
    this.button.label = this.button.options.label = words()[this.isOpen ? "fewer" : "more"]; // by canvas, by Vue
    this.refresh();
  }

  /** Nodes that Vue draws look at their widgets and sockets again. */
  refresh() {
    const { graph, id } = this.node;
    if (!graph || app.configuringGraph || !window.LiteGraph?.vueNodesMode) return;
    if (this.isNative) graph.trigger?.("node:slot-links:changed", { nodeId: id, slotType: INPUT });
    else graph.onNodeAdded?.(this.node);
  }

  /** The room that was free on the node stays free. */
  opened(open) {
    const { node } = this;
    const free = Math.max(node.size[1] - node.computeSize()[1], 0);
    open();
    if (this.isConfiguring) return;
    this.settle();
    node.setSize([node.size[0], Math.round(node.computeSize()[1] + free)]);
  }

  /** A link that is dragged finds the sockets of its type, which leave again if it goes elsewhere. */
  reveal(type) {
    const fitting = this.away().filter((socket) => socket.type === type);
    this.putBack(fitting);
    if (fitting.length) {
      this.refresh();
      this.look();
    }
    return fitting.length > 0;
  }

  look() {
    setTimeout(() => (app.canvas?.linkConnector?.isConnecting ? this.look() : this.settle()), LET_GO);
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
    node.configure = (saved, ...more) => {
      this.isConfiguring = true;
      try {
        node.inputs = [...this.first, ...node.inputs.filter(({ name }) => !this.first.some((is) => is.name === name))];
        if (node.showAdvanced) node.showAdvanced = Boolean(saved?.showAdvanced);
        return configure.call(node, saved, ...more);
      } finally {
        this.isConfiguring = false;
        if (app.configuringGraph) setTimeout(() => this.settle()); // no one tells nodes of a subgraph when it is done
        else this.settle();
      }
    };
    after(node, "onAfterGraphConfigured", () => this.settle());
    const find = node.findInputByType;
    node.findInputByType = (type, ...more) =>
      find.call(node, type, ...more) ?? (this.reveal(type) ? find.call(node, type, ...more) : undefined);
  }

  /** In no file and in no queue; where the newer renderer has a button of its own, on the canvas alone. */
  addButton() {
    const press = () => (this.node.showAdvanced = !this.isOpen);
    this.button = this.node.addWidget("button", "", null, press, { serialize: false, canvasOnly: this.isNative });
    this.button.serialize = false;
  }
}

/** Sockets without a widget that the node's description calls advanced. */
function sockets(node) {
  const { required, optional } = node.constructor.nodeData.input ?? {};
  const inputs = { ...required, ...optional };
  return (node.inputs ?? [])
    .filter((input) => !input.widget && inputs[input.name]?.[1]?.advanced)
    .map(({ name, type, shape, localized_name }) => ({ name, type, shape, localized_name }));
}

app.registerExtension({
  name: "ziplora.advanced",
  nodeCreated(node) {
    if (!isOurs(node) || setting(ALWAYS)) return;
    const widgets = node.widgets?.filter((widget) => widget.options?.advanced) ?? [];
    const hidden = new Advanced(node, widgets, sockets(node));
    if (!widgets.length && !hidden.sockets.length) return;
    hidden.addButton();
    hidden.watch();
    hidden.settle();
    node.setSize([node.size[0], node.computeSize()[1]]);
  },
});

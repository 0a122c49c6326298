// An element in a node's body, and what the page would do to it.

const gone = new Map(); // "number kind" -> element of a node that was just removed

/**
 * Show `element` in the body of `node`, over the whole width and as high as `height()` says, in pixels. It brings its
 * `style`, a `<style>` of its own classes, along: nothing of ours is in the page where no node of ours is.
 *
 * It takes no part in what is saved, and the side panel, which cannot show it, does not list it. That panel also writes
 * the width of its own column into what it lists, and the classic canvas would then draw the element that wide: the
 * width is the node's, whoever writes it.
 */
export function addElement(node, name, element, style, height) {
  element.insertAdjacentHTML("afterbegin", style);
  const widget = node.addDOMWidget(name, name, element, {
    ...{ serialize: false, hideOnZoom: false, hideInPanel: true },
    ...{ getMinHeight: height, getMaxHeight: height },
  });
  widget.serialize = false; // widget values are saved by position: this one takes none
  Object.defineProperty(widget, "width", { get: () => undefined, set: () => {} });
  after(node, "onResize", () => fit(node));
  after(node, "onConfigure", () => takePlace(node, element));
  after(node, "onRemoved", () => leavePlace(node, element));
  return widget;
}

/**
 * Make the node as large as its widgets want it, as soon as they do. The page would do so when it draws and when a
 * workflow is opened, and undo would take the difference for a step of the user's.
 *
 * Nodes 2.0 measures what it has drawn, and keeps what is larger: for nodes that are higher there than on the classic
 * canvas, `more` says by how many pixels. Without it, nothing is done there.
 */
export function fit(node, more = 0) {
  if (LiteGraph.vueNodesMode && !more) return;
  const [width, least] = node.computeSize();
  const height = least + (LiteGraph.vueNodesMode ? more : 0);
  if (node.size[0] < width || node.size[1] < height)
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}

/** Call `then` after whatever `object[name]` does. */
export function after(object, name, then) {
  const earlier = object[name]; // keep whoever was there before us
  object[name] = function (...args) {
    const result = earlier?.apply(this, args);
    then();
    return result;
  };
}

// Undo makes new nodes with the old numbers. Nodes 2.0 keeps what it drew for such a number, so it goes on showing the
// element of the node that is gone, and never puts the new one's on the page.

/** The node of `element` was removed. */
function leavePlace(node, element) {
  const key = keyOf(node, element);
  gone.set(key, element);
  setTimeout(() => gone.get(key) === element && gone.delete(key), 5000);
}

/** Put `element` where that of the removed node with the same number still stands. */
async function takePlace(node, element) {
  for (let frame = 0; frame < 10 && !element.isConnected; frame++) {
    await new Promise(requestAnimationFrame);
    const before = gone.get(keyOf(node, element));
    if (LiteGraph.vueNodesMode && before?.isConnected && !element.isConnected) before.replaceWith(element);
  }
}

function keyOf(node, element) {
  return `${node.id} ${element.classList[0]}`;
}

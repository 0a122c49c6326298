// An element in a node's body, and undo.
//
// Undo makes new nodes with the old numbers. Nodes 2.0 keeps what it drew for such a number, so it goes on showing the
// element of the node that is gone, and never puts the new one's on the page.

const gone = new Map(); // "number kind" -> element of a node that was just removed

/** The node of `element` was removed. */
export function leavePlace(node, element) {
  const key = keyOf(node, element);
  gone.set(key, element);
  setTimeout(() => gone.get(key) === element && gone.delete(key), 5000);
}

/** Put `element` where that of the removed node with the same number still stands. */
export async function takePlace(node, element) {
  for (let frame = 0; frame < 10 && !element.isConnected; frame++) {
    await new Promise(requestAnimationFrame);
    const before = gone.get(keyOf(node, element));
    if (LiteGraph.vueNodesMode && before?.isConnected && !element.isConnected) before.replaceWith(element);
  }
}

function keyOf(node, element) {
  return `${node.id} ${element.classList[0]}`;
}

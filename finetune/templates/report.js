/* The value under the pointer, in each chart; the page says everything without it. */
"use strict";
for (const svg of document.querySelectorAll("svg[data-axes]")) {
  const [x0, x1, y0, y1, log] = svg.dataset.axes.split(" ").map(Number);
  const axis = svg.querySelector(".axis").getAttribute("d").match(/[\d.]+/g).map(Number);
  const [left, top, bottom, right] = axis;
  const readout = document.createElementNS("http://www.w3.org/2000/svg", "text");
  readout.setAttribute("class", "readout");
  readout.setAttribute("y", top + 8);
  readout.setAttribute("text-anchor", "end");
  readout.setAttribute("x", right);
  svg.append(readout);
  const short = (value) => Number(value.toPrecision(4)).toLocaleString("en");
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const inside = at.x >= left && at.x <= right && at.y >= top && at.y <= bottom;
    const share = (bottom - at.y) / (bottom - top);
    const y = log ? y0 * Math.pow(y1 / y0, share) : y0 + share * (y1 - y0);
    readout.textContent = inside ? `${short(x0 + ((at.x - left) / (right - left)) * (x1 - x0))} · ${short(y)}` : "";
  });
  svg.addEventListener("pointerleave", () => { readout.textContent = ""; });
}

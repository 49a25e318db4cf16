"use strict";
// Reads the values out under the pointer and hides runs; without it the page is complete but still.
const data = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return step - steps[low] <= steps[high] - step ? low : high;
}

function readout(panel, step) {
  const shown = panel.curves.filter(curve => !hidden.has(curve.run));
  return shown.map(curve => {
    const i = nearest(curve.steps, step), value = curve.values[i];
    const text = value === null ? "not finite" : Number(value.toPrecision(5));
    return `${data.runs[curve.run]}: ${curve.name} ${text} at step ${curve.steps[i]}`;
  });
}

document.querySelectorAll(".panel").forEach((element, index) => {
  const panel = data.panels[index], svg = element.querySelector("svg");
  const cursor = svg.querySelector(".cursor"), output = element.querySelector(".readout");
  svg.addEventListener("pointermove", event => {
    const area = svg.getBoundingClientRect();
    const x = (event.clientX - area.left) * svg.viewBox.baseVal.width / area.width;
    const share = Math.min(1, Math.max(0, (x - panel.left) / panel.width));
    cursor.setAttribute("x1", panel.left + share * panel.width);
    cursor.setAttribute("x2", panel.left + share * panel.width);
    cursor.style.visibility = "visible";
    output.replaceChildren();
    for (const text of readout(panel, panel.first + share * (panel.last - panel.first))) {
      output.append(text, document.createElement("br"));
    }
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    output.replaceChildren();
  });
});

document.querySelectorAll("input[data-run]").forEach(box => {
  box.addEventListener("change", () => {
    const run = Number(box.dataset.run);
    if (box.checked) hidden.delete(run); else hidden.add(run);
    document.querySelectorAll(`[data-of="${run}"]`).forEach(part => {
      part.style.display = box.checked ? "" : "none";
    });
  });
});

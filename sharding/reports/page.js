// Draws the page once its parts are there.
drawHead();
drawStep();
drawFilters();
drawTables();
drawCharts();
if (plan.notes.length) {
  byId("notes").hidden = false;
  byId("note-list").append(...plan.notes.map((note) => make("li", {}, ...withCode(note))));
}
byId("footer").textContent = `Written by Papilio ${plan.version}. Times are predicted, not measured.`;
addEventListener("beforeprint", () => { listing.wasAll = listing.all; listing.all = true; drawTables(); });
addEventListener("afterprint", () => { listing.all = listing.wasAll; drawTables(); });

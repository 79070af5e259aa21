"use strict";
const plan = JSON.parse(document.getElementById("plan").textContent);
const text = document.createElement("pre");
text.textContent = JSON.stringify(plan, null, 1);
document.getElementById("page").append(text);

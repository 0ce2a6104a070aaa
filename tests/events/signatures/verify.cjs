// Verifies messages by the JavaScript library of Standard Webhooks.
const { readFileSync } = require("node:fs");
const { Webhook } = require("standardwebhooks");

const recorded = JSON.parse(readFileSync(process.argv[2], "utf8"));
let count = 0;
for (const { headers, body } of recorded.messages) {
  for (const secret of recorded.secrets) {
    const webhook = new Webhook(secret);
    const event = webhook.verify(body, headers);
    if (event.id !== headers["webhook-id"]) throw new Error(event.id);
    let passes = true;
    try {
      webhook.verify(body.replace("EUR", "USD"), headers);
    } catch {
      passes = false;
    }
    if (passes) throw new Error("an altered message passes");
    count += 1;
  }
}
if (count < 2) throw new Error("no messages");
console.log(`JavaScript: ${count} verified`);

/** How a CommonJS module of others sees the types, nodenext, with nothing skipped: `make check`. */

import tokenwire = require("tokenwire");
import testing = require("tokenwire/testing");

const client = new tokenwire.Tokenwire({ tls: true });
export const reply: Promise<tokenwire.Reply> = client.chat([{ role: "user", content: "x" }]);
export const gateway: Promise<testing.FakeGateway> = testing.FakeGateway.start();

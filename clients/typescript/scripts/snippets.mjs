// Writes each TypeScript snippet of the README as a module of its own, for tsc to check and for
// tests/readme.test.ts to run: node scripts/snippets.mjs README.md FOLDER
//
// Snippets of one section are one module, as a reader would paste them; the last snippet of
// "Connect" comes before each. Those of "Connect" itself stand in blocks of their own.

import { mkdirSync, readFileSync, writeFileSync } from "node:fs";

const [, , readme, folder] = process.argv;

const sections = new Map();
for (const part of readFileSync(readme, "utf8")
  .split(/^#{2,3} /m)
  .slice(1)) {
  const title = part.split("\n", 1)[0];
  const code = [...part.matchAll(/^```ts\n(.*?)^```/gms)].map(([, text]) => text);
  if (code.length > 0) sections.set(title, code);
}

mkdirSync(folder, { recursive: true });
const preamble = sections.get("Connect").at(-1);
for (const [title, code] of sections) {
  const whole = title === "Connect" ? code : [preamble, ...code];
  // Two snippets may import the same name; a module may not.
  const named = new Map();
  const others = new Set();
  const blocks = whole.map((text) =>
    text.replace(/^import [^;]*;\n/gm, (statement) => {
      const [, head, names, from] = /^import (type )?\{([^}]*)\} from (.*);/.exec(statement) ?? [];
      if (names === undefined) others.add(statement.trim());
      else {
        const key = `import ${head ?? ""}* from ${from};`;
        if (!named.has(key)) named.set(key, new Set());
        for (const name of names.split(",")) named.get(key).add(name.trim());
      }
      return "";
    }),
  );
  const imports = [...named].map(([key, names]) =>
    key.replace("*", `{ ${[...names].join(", ")} }`),
  );
  const body = title === "Connect" ? blocks.map((block) => `{\n${block}}\n`) : blocks;
  const name = title.toLowerCase().replaceAll(" ", "-");
  const text = [...others, ...imports, ...body, "export {};\n"].join("\n");
  writeFileSync(`${folder}/${name}.ts`, text);
}
writeFileSync(`${folder}/sections.json`, JSON.stringify([...sections.keys()]));

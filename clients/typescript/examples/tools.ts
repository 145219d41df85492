/**
 * A model that may call two functions; the answer and the calls arrive as a stream.
 *
 * node tools.js [MODEL]
 */

import { type Message, Tokenwire, type Tool, type ToolCall } from "tokenwire";

const WEATHER: Record<string, number> = { Oslo: -3, Rome: 21 };

const tools: Tool[] = [
  {
    name: "weather",
    description: "Temperature in a city, in degrees Celsius",
    parameters: {
      type: "object",
      properties: { city: { type: "string" } },
      required: ["city"],
    },
  },
  { name: "cities", description: "Names of the cities that have a thermometer" },
];

/** What the model asked for; an answer it understands when it asked for nonsense. */
function run(call: ToolCall): unknown {
  switch (call.name) {
    case "cities":
      return Object.keys(WEATHER);
    case "weather":
      return WEATHER[String(call.arguments["city"])] ?? "no such city";
    default:
      return `no such tool: ${call.name}`;
  }
}

function answer(call: ToolCall): unknown {
  try {
    return run(call);
  } catch (error) {
    if (error instanceof SyntaxError) return error.message; // not JSON: let the model try again
    throw error;
  }
}

const model = process.argv[2] ?? "gpt-4o-mini";
const conversation: Message[] = [{ role: "user", content: "Where is it warmer, Oslo or Rome?" }];
await using client = new Tokenwire();

for (;;) {
  const stream = client.stream(conversation, { model, tools });
  for await (const text of stream.textDeltas()) process.stdout.write(text);
  process.stdout.write("\n");
  conversation.push(stream.message);
  if (stream.toolCalls.length === 0) break;
  for (const call of stream.toolCalls) {
    const result = answer(call);
    console.log(`[${call.name} ${call.rawArguments} -> ${result}]`);
    conversation.push(call.answer(result));
  }
}

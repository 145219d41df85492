package io.tokenwire.conformance;

import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import io.tokenwire.Answer;
import io.tokenwire.BatchParams;
import io.tokenwire.BatchResult;
import io.tokenwire.BatchStream;
import io.tokenwire.ChatEvent;
import io.tokenwire.ChatParams;
import io.tokenwire.ChatStream;
import io.tokenwire.Choice;
import io.tokenwire.FinishReason;
import io.tokenwire.Message;
import io.tokenwire.ModelInfo;
import io.tokenwire.Reply;
import io.tokenwire.RequestOptions;
import io.tokenwire.TokenCount;
import io.tokenwire.Tokens;
import io.tokenwire.TokenwireClient;
import io.tokenwire.TokenwireException;
import io.tokenwire.Tool;
import io.tokenwire.ToolCall;
import io.tokenwire.ToolChoice;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.HexFormat;
import java.util.List;
import java.util.Timer;
import java.util.TimerTask;

/** Runs the conformance cases with the Java client: tests/conformance/README.md. */
public final class Main {
  private static final Gson GSON =
      new GsonBuilder().serializeNulls().disableHtmlEscaping().create();

  private Main() {}

  /**
   * Answers one case for each line of standard input.
   *
   * @param args none
   * @throws IOException if standard input cannot be read
   */
  public static void main(String[] args) throws IOException {
    PrintStream out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
    BufferedReader in =
        new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    for (String text = in.readLine(); text != null; text = in.readLine()) {
      JsonObject asked = JsonParser.parseString(text).getAsJsonObject();
      JsonObject test = asked.getAsJsonObject("case");
      JsonObject line;
      try {
        line = run(test, asked.getAsJsonObject("connect"));
      } catch (TokenwireException e) {
        line = failed(e);
      } catch (Exception e) {
        line = new JsonObject();
        line.addProperty("defect", e.toString());
      }
      line.add("case", test.get("name"));
      out.println(GSON.toJson(line));
    }
    System.exit(0); // gRPC's threads may idle on
  }

  private static JsonObject run(JsonObject test, JsonObject connect) throws Exception {
    try (TokenwireClient client = client(connect)) {
      int earlier = 0;
      for (int i = number(test, "repeat", 1); i > 1; i--) {
        earlier += once(client, test).get("ok").getAsBoolean() ? 1 : 0;
        Thread.sleep(number(test, "gap_ms", 0));
      }
      JsonObject line = once(client, test);
      line.addProperty("earlier", earlier);
      return line;
    }
  }

  private static TokenwireClient client(JsonObject connect) {
    TokenwireClient.Builder builder =
        TokenwireClient.builder(text(connect, "target", "")).token(text(connect, "token", ""));
    if (connect.has("cert_file")) {
      builder.mutualTls(
          Path.of(text(connect, "ca_file", "")),
          Path.of(text(connect, "cert_file", "")),
          Path.of(text(connect, "key_file", "")));
    } else if (connect.has("ca_file")) {
      builder.tls(Path.of(text(connect, "ca_file", "")));
    }
    return builder.build();
  }

  private static JsonObject once(TokenwireClient client, JsonObject test) throws Exception {
    JsonObject request = test.getAsJsonObject("request");
    RequestOptions options = options(test);
    return switch (text(test, "op", "")) {
      case "chat" -> chat(client, test, params(request), options);
      case "stream" -> stream(client, test, params(request), options);
      case "batch" -> {
        try (BatchStream results = client.batch(batch(request), options)) {
          List<BatchResult> all = new ArrayList<>();
          results.forEach(all::add);
          yield results(all);
        }
      }
      case "batch_ordered" -> results(client.batchOrdered(batch(request), options));
      case "count_tokens" -> {
        TokenCount count =
            client.countTokens(text(request, "model", ""), text(request, "prompt", ""), options);
        JsonObject line = ok();
        line.addProperty("tokens", count.totalTokens());
        line.addProperty("tokenizer", count.tokenizer());
        yield line;
      }
      case "tokenize" -> tokens(client, request, options);
      case "models" -> {
        JsonObject line = ok();
        line.add(
            "models",
            GSON.toJsonTree(client.models(options).stream().map(ModelInfo::name).toList()));
        yield line;
      }
      default -> throw new IllegalArgumentException("no op " + test.get("op"));
    };
  }

  // --- what is asked

  private static RequestOptions options(JsonObject test) {
    RequestOptions.Builder options = RequestOptions.builder();
    if (test.has("timeout_ms")) {
      options.timeout(Duration.ofMillis(test.get("timeout_ms").getAsLong()));
    }
    if (test.has("request_id")) {
      options.requestId(text(test, "request_id", ""));
    }
    if (test.has("metadata")) {
      test.getAsJsonObject("metadata")
          .asMap()
          .forEach((name, value) -> options.metadata(name, value.getAsString()));
    }
    if (test.has("mode")) {
      options.cumulative(text(test, "mode", "").equals("cumulative"));
    }
    return options.build();
  }

  private static ChatParams params(JsonObject request) {
    ChatParams.Builder chat = ChatParams.builder().model(text(request, "model", ""));
    if (request.has("prompt_bytes")) {
      chat.user("a".repeat(request.get("prompt_bytes").getAsInt()));
    } else if (request.has("messages")) {
      for (JsonElement each : request.getAsJsonArray("messages")) {
        JsonObject message = each.getAsJsonObject();
        chat.message(Message.of(text(message, "role", ""), text(message, "content", "")));
      }
    } else {
      chat.user(text(request, "prompt", ""));
    }
    request.asMap().forEach((name, value) -> set(chat, name, value));
    return chat.build();
  }

  private static void set(ChatParams.Builder chat, String name, JsonElement value) {
    switch (name) {
      case "temperature" -> chat.temperature(value.getAsDouble());
      case "top_k" -> chat.topK(value.getAsInt());
      case "max_completion_tokens" -> chat.maxCompletionTokens(value.getAsInt());
      case "choice_count" -> chat.choiceCount(value.getAsInt());
      case "stop" ->
          chat.stop(
              value.getAsJsonArray().asList().stream()
                  .map(JsonElement::getAsString)
                  .toArray(String[]::new));
      case "tools" ->
          chat.tools(
              value.getAsJsonArray().asList().stream()
                  .map(JsonElement::getAsJsonObject)
                  .map(
                      tool ->
                          Tool.function(
                              text(tool, "name", ""),
                              text(tool, "description", ""),
                              tool.get("parameters").toString()))
                  .toList());
      case "tool_choice" ->
          chat.toolChoice(
              switch (value.getAsString()) {
                case "auto" -> ToolChoice.AUTO;
                case "none" -> ToolChoice.NONE;
                default -> ToolChoice.REQUIRED;
              });
      case "json_schema" -> chat.jsonSchema("answer", value.toString());
      case "role_templates" ->
          value
              .getAsJsonArray()
              .forEach(
                  each -> {
                    JsonObject role = each.getAsJsonObject();
                    chat.roleTemplate(
                        text(role, "role", ""),
                        text(role, "api_role", ""),
                        text(role, "begin", ""),
                        text(role, "end", ""));
                  });
      case "unsupported_parameters" ->
          chat.dropUnsupportedParameters(value.getAsString().equals("drop"));
      case "extra_body" -> chat.extraBody(value.toString());
      case "labels" ->
          value
              .getAsJsonObject()
              .asMap()
              .forEach((key, label) -> chat.label(key, label.getAsString()));
      default -> {
        // model and messages are set
      }
    }
  }

  private static BatchParams batch(JsonObject request) {
    BatchParams.Builder batch =
        BatchParams.builder().maxConcurrency(number(request, "max_concurrency", 0));
    for (JsonElement each : request.getAsJsonArray("items")) {
      JsonObject item = each.getAsJsonObject();
      batch.item(text(item, "custom_id", ""), params(item));
    }
    return batch.build();
  }

  // --- what is told

  private static JsonObject chat(
      TokenwireClient client, JsonObject test, ChatParams params, RequestOptions options) {
    Timer timer = later(test, client::close); // a waiting call is left from elsewhere
    try {
      Reply reply = client.chat(params, options);
      return answer(test, reply, reply);
    } finally {
      timer.cancel();
    }
  }

  private static JsonObject stream(
      TokenwireClient client, JsonObject test, ChatParams params, RequestOptions options)
      throws InterruptedException {
    JsonObject leave = test.has("leave") ? test.getAsJsonObject("leave") : new JsonObject();
    int enough = number(leave, "after_text", Integer.MAX_VALUE);
    List<String> kinds = new ArrayList<>();
    List<String> states = new ArrayList<>();
    Timer timer = null;
    try (ChatStream stream = client.stream(params, options)) {
      timer = later(test, stream::close);
      int pause = number(test, "pause_ms", 0);
      StringBuilder text = new StringBuilder();
      for (ChatEvent event : stream) {
        add(kinds, event.kind().name().toLowerCase(java.util.Locale.ROOT));
        if (event.kind() == ChatEvent.Kind.SNAPSHOT) {
          add(states, event.proto().getSnapshot().getState().name().replace("STATE_", ""));
        }
        Thread.sleep(number(test, "read_delay_ms", 0) + pause);
        pause = 0;
        text.append(event.choiceIndex() == 0 ? event.text() : "");
        if (text.length() >= enough) {
          JsonObject line = ok();
          line.addProperty("left", true);
          line.addProperty("partial_text", stream.text());
          return line;
        }
      }
      JsonObject line = answer(test, stream.reply(), stream);
      line.add("kinds", GSON.toJsonTree(kinds));
      if (!states.isEmpty()) {
        line.add("states", GSON.toJsonTree(states));
      }
      return line;
    } finally {
      if (timer != null) {
        timer.cancel();
      }
    }
  }

  private static void add(List<String> seen, String next) {
    if (seen.isEmpty() || !seen.get(seen.size() - 1).equals(next)) {
      seen.add(next);
    }
  }

  private static JsonObject answer(JsonObject test, Reply reply, Answer same) {
    JsonObject line = ok();
    JsonArray choices = new JsonArray();
    for (Choice choice : same.choices()) {
      JsonObject each = new JsonObject();
      each.addProperty("index", choice.index());
      each.addProperty("text", choice.text());
      each.addProperty("reasoning", choice.reasoning());
      each.addProperty(
          "finish_reason",
          choice.finishReason() == FinishReason.UNFINISHED ? "" : choice.finishReason().name());
      JsonArray calls = new JsonArray();
      for (ToolCall call : choice.toolCalls()) {
        JsonObject one = new JsonObject();
        one.addProperty("id", call.id());
        one.addProperty("name", call.name());
        one.add("arguments", GSON.toJsonTree(call.arguments()));
        calls.add(one);
      }
      each.add("tool_calls", calls);
      choices.add(each);
    }
    line.add("choices", choices);
    JsonObject usage = new JsonObject();
    usage.addProperty("prompt", reply.usage().promptTokens());
    usage.addProperty("completion", reply.usage().completionTokens());
    usage.addProperty("total", reply.usage().totalTokens());
    usage.addProperty("estimated", reply.usage().estimated());
    line.add("usage", usage);
    JsonObject header = new JsonObject();
    header.addProperty("model", reply.header().model());
    header.addProperty("upstream", reply.header().upstream());
    header.addProperty("attempts", reply.header().attempts().size());
    header.add("dropped", GSON.toJsonTree(reply.header().droppedParameters()));
    line.add("header", header);
    line.addProperty("request_id", !reply.requestId().isEmpty());
    if (test.getAsJsonObject("request").has("json_schema")) {
      line.add("json", GSON.toJsonTree(reply.json()));
    }
    return line;
  }

  private static JsonObject failed(TokenwireException error) {
    JsonObject line = new JsonObject();
    line.addProperty("ok", false);
    line.add("error", error(error));
    return line;
  }

  private static JsonObject error(TokenwireException error) {
    JsonObject told = new JsonObject();
    told.addProperty("code", error.code().name());
    told.addProperty("reason", error.reason());
    told.addProperty("retry_after_ms", error.retryAfter().map(Duration::toMillis).orElse(null));
    told.addProperty("retryable", error.isRetryable());
    told.addProperty("attempts", error.attempts());
    told.addProperty("request_id", !error.requestId().isEmpty());
    told.addProperty("partial_text", error.partialText());
    told.add(
        "fields",
        GSON.toJsonTree(
            error.fieldViolations().stream()
                .map(TokenwireException.FieldViolation::field)
                .toList()));
    return told;
  }

  private static JsonObject results(List<BatchResult> results) {
    JsonArray rows = new JsonArray();
    results.stream()
        .sorted(Comparator.comparing(BatchResult::index))
        .forEach(
            result -> {
              JsonObject row = new JsonObject();
              row.addProperty("index", result.index());
              row.addProperty("custom_id", result.customId());
              result.error().ifPresent(error -> row.add("error", error(error)));
              result.reply().ifPresent(reply -> row.addProperty("text", reply.text()));
              rows.add(row);
            });
    JsonObject line = ok();
    line.add("results", rows);
    return line;
  }

  private static JsonObject tokens(
      TokenwireClient client, JsonObject request, RequestOptions options) {
    List<String> texts =
        request.getAsJsonArray("texts").asList().stream().map(JsonElement::getAsString).toList();
    List<Tokens> lists = client.tokenize(text(request, "model", ""), texts, options);
    JsonObject line = ok();
    line.add("ids", GSON.toJsonTree(lists.stream().map(Tokens::ids).toList()));
    line.add(
        "pieces",
        GSON.toJsonTree(
            lists.stream()
                .map(each -> each.pieces().stream().map(HexFormat.of()::formatHex).toList())
                .toList()));
    return line;
  }

  // --- both

  /** Does something as long after now as the case says, unless cancelled before. */
  private static Timer later(JsonObject test, Runnable what) {
    JsonObject leave = test.has("leave") ? test.getAsJsonObject("leave") : new JsonObject();
    Timer timer = new Timer(true);
    if (!leave.has("after_ms")) {
      return timer;
    }
    timer.schedule(
        new TimerTask() {
          @Override
          public void run() {
            what.run();
          }
        },
        leave.get("after_ms").getAsLong());
    return timer;
  }

  private static JsonObject ok() {
    JsonObject line = new JsonObject();
    line.addProperty("ok", true);
    return line;
  }

  private static String text(JsonObject from, String name, String otherwise) {
    return from.has(name) ? from.get(name).getAsString() : otherwise;
  }

  private static int number(JsonObject from, String name, int otherwise) {
    return from.has(name) ? from.get(name).getAsInt() : otherwise;
  }
}

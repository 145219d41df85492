package io.tokenwire;

import io.tokenwire.v1.Annotation;
import io.tokenwire.v1.ChatMessage;
import io.tokenwire.v1.ChatResponse;
import io.tokenwire.v1.Delta;
import io.tokenwire.v1.Finish;
import io.tokenwire.v1.ResponseHeader;
import io.tokenwire.v1.StreamChatResponse;
import io.tokenwire.v1.StreamTrailer;
import io.tokenwire.v1.TokenLogprob;
import io.tokenwire.v1.ToolCallDelta;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.TreeMap;

/**
 * Folds the events of one stream into the answer so far. Does no I/O. A stream of the client holds
 * one; use it by itself to fold events that came another way. Not for several threads at once.
 */
public final class Accumulator implements Answer {
  private final JsonCodec json;
  private final TreeMap<Integer, Growing> growing = new TreeMap<>();
  private ResponseHeader header;
  private StreamTrailer trailer;
  private List<Choice> cached;

  /** Begins with nothing. */
  public Accumulator() {
    this(JsonCodec.gson());
  }

  Accumulator(JsonCodec json) {
    this.json = json;
  }

  /**
   * Folds one event in.
   *
   * @param message the event as it arrived
   * @return the event; empty for one to ignore: a heartbeat, or one newer than this package
   */
  public Optional<ChatEvent> add(StreamChatResponse message) {
    ChatEvent.Kind kind;
    String text = "";
    switch (message.getEventCase()) {
      case DELTA -> {
        kind = ChatEvent.Kind.DELTA;
        text = message.getDelta().getContent();
        choice(message.getDelta().getChoiceIndex()).append(message.getDelta());
      }
      case SNAPSHOT -> {
        kind = ChatEvent.Kind.SNAPSHOT;
        var snapshot = message.getSnapshot();
        text = choice(snapshot.getChoiceIndex()).replace(snapshot.getMessage());
      }
      case FINISH -> {
        kind = ChatEvent.Kind.FINISH;
        choice(message.getFinish().getChoiceIndex()).finish = message.getFinish();
      }
      case HEADER -> {
        kind = ChatEvent.Kind.HEADER;
        header = message.getHeader();
      }
      case TRAILER -> {
        kind = ChatEvent.Kind.TRAILER;
        trailer = message.getTrailer();
      }
      default -> {
        return Optional.empty();
      }
    }
    return Optional.of(new ChatEvent(message, kind, text));
  }

  @Override
  public List<Choice> choices() {
    if (cached == null) {
      List<Choice> choices = new ArrayList<>();
      growing.forEach((index, each) -> choices.add(new Choice(each.proto(index), json)));
      cached = List.copyOf(choices);
    }
    return cached;
  }

  /**
   * Model, upstream, attempts.
   *
   * @return the header; empty before the first event
   */
  public Optional<ReplyHeader> header() {
    return Optional.ofNullable(header).map(ReplyHeader::of);
  }

  /**
   * Tokens used.
   *
   * @return the usage; empty before the last event
   */
  public Optional<Usage> usage() {
    return Optional.ofNullable(trailer).map(each -> Usage.of(each.getUsage()));
  }

  /**
   * Whether the trailer has arrived: without it the answer is only a part.
   *
   * @return whether the whole answer is here
   */
  public boolean isComplete() {
    return trailer != null;
  }

  /**
   * What has arrived, in the shape of a whole answer; see {@link #isComplete}.
   *
   * @return the reply
   */
  public Reply reply() {
    return reply("");
  }

  Reply reply(String requestId) {
    ChatResponse.Builder response = ChatResponse.newBuilder();
    choices().forEach(choice -> response.addChoices(choice.proto()));
    if (header != null) {
      response.setHeader(header);
    }
    if (trailer != null && !trailer.getExtraJson().isEmpty()) {
      // What a whole answer has in its header, a stream learns when that has gone.
      Map<String, Object> extra = new LinkedHashMap<>(extra(response.getHeader().getExtraJson()));
      extra.putAll(extra(trailer.getExtraJson()));
      response.getHeaderBuilder().setExtraJson(Json.write(Json.GSON, extra, "extra_json"));
    }
    if (trailer != null && trailer.hasUsage()) { // else nobody reported it
      response.setUsage(trailer.getUsage());
    }
    return new Reply(response.build(), requestId, json);
  }

  private Growing choice(int index) {
    cached = null;
    return growing.computeIfAbsent(index, unused -> new Growing());
  }

  /** Unmodelled fields; they are a courtesy, and must not cost the answer. */
  private static Map<String, Object> extra(String text) {
    try {
      return text.isEmpty() ? Map.of() : Json.object(Json.GSON, text, "extra_json");
    } catch (InvalidJsonException e) {
      return Map.of();
    }
  }

  /** One choice while it grows. */
  private static final class Growing {
    private final StringBuilder content = new StringBuilder();
    private final StringBuilder reasoning = new StringBuilder();
    private final StringBuilder refusal = new StringBuilder();
    private final TreeMap<Integer, GrowingCall> calls = new TreeMap<>();
    private final List<TokenLogprob> logprobs = new ArrayList<>();
    private final List<Annotation> annotations = new ArrayList<>();
    private Map<String, Object> extra = Map.of();
    private ChatMessage whole;
    private Finish finish = Finish.getDefaultInstance();

    void append(Delta delta) {
      content.append(delta.getContent());
      reasoning.append(delta.getReasoning());
      refusal.append(delta.getRefusal());
      for (ToolCallDelta part : delta.getToolCallsList()) {
        calls.computeIfAbsent(part.getIndex(), unused -> new GrowingCall()).append(part);
      }
      logprobs.addAll(delta.getLogprobsList());
      annotations.addAll(delta.getAnnotationsList());
      if (!delta.getExtraJson().isEmpty()) {
        extra = merged(extra, extra(delta.getExtraJson()));
      }
    }

    /** Takes a snapshot; returns the text that is new in it. */
    String replace(ChatMessage message) {
      String before = whole == null ? "" : whole.getContent();
      whole = message;
      String now = message.getContent();
      return now.startsWith(before) ? now.substring(before.length()) : now;
    }

    io.tokenwire.v1.Choice proto(int index) {
      return io.tokenwire.v1.Choice.newBuilder()
          .setIndex(index)
          .setMessage(whole != null ? whole : message())
          .setFinishReasonValue(finish.getFinishReasonValue())
          .setFinishReasonRaw(finish.getFinishReasonRaw())
          .addAllLogprobs(logprobs)
          .setExtraJson(finish.getExtraJson())
          .build();
    }

    private ChatMessage message() {
      ChatMessage.Builder message =
          ChatMessage.newBuilder().setRole("assistant").addAllAnnotations(annotations);
      calls.values().forEach(call -> message.addToolCalls(call.proto()));
      if (!refusal.isEmpty()) {
        message.setRefusal(refusal.toString());
      }
      if (!reasoning.isEmpty()) {
        message.setReasoning(reasoning.toString());
      }
      if (!content.isEmpty() || (calls.isEmpty() && refusal.isEmpty())) {
        // A turn that only calls tools has null content, not an empty one.
        message.setContent(content.toString());
      }
      if (!extra.isEmpty()) {
        message.setExtraJson(Json.write(Json.GSON, extra, "extra_json"));
      }
      return message.build();
    }

    /** Delta semantics for JSON nobody has modelled: text and lists grow, objects merge. */
    private static Map<String, Object> merged(Map<?, ?> before, Map<?, ?> after) {
      Map<String, Object> merged = new LinkedHashMap<>();
      before.forEach((key, value) -> merged.put((String) key, value));
      after.forEach((key, value) -> merged.put((String) key, grown(merged.get(key), value)));
      return merged;
    }

    private static Object grown(Object before, Object after) {
      if (before instanceof Map<?, ?> old && after instanceof Map<?, ?> more) {
        return merged(old, more);
      }
      if (before instanceof String old && after instanceof String more) {
        return old + more;
      }
      if (before instanceof List<?> old && after instanceof List<?> more) {
        List<Object> both = new ArrayList<>(old);
        both.addAll(more);
        return both;
      }
      return after;
    }
  }

  /** One tool call while it grows: the first id and name win, arguments append. */
  private static final class GrowingCall {
    private final StringBuilder arguments = new StringBuilder();
    private String id = "";
    private String name = "";
    private boolean custom;

    void append(ToolCallDelta part) {
      id = id.isEmpty() ? part.getId() : id;
      name = name.isEmpty() ? part.getName() : name;
      custom |= part.getCustom();
      arguments.append(part.getArguments());
    }

    io.tokenwire.v1.ToolCall proto() {
      io.tokenwire.v1.ToolCall.Builder call = io.tokenwire.v1.ToolCall.newBuilder().setId(id);
      if (custom) {
        call.getCustomBuilder().setName(name).setInput(arguments.toString());
      } else {
        call.getFunctionBuilder().setName(name).setArgumentsJson(arguments.toString());
      }
      return call.build();
    }
  }
}

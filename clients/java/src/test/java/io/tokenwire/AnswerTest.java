package io.tokenwire;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.rpc.ErrorInfo;
import io.grpc.Metadata;
import io.grpc.Status;
import io.tokenwire.testing.Failure;
import io.tokenwire.v1.ChatMessage;
import io.tokenwire.v1.Delta;
import io.tokenwire.v1.Finish;
import io.tokenwire.v1.FunctionCall;
import io.tokenwire.v1.Snapshot;
import io.tokenwire.v1.StreamChatResponse;
import io.tokenwire.v1.StreamTrailer;
import io.tokenwire.v1.ToolCallDelta;
import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.ObjectInputStream;
import java.io.ObjectOutputStream;
import java.math.BigInteger;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.stream.Collectors;
import org.junit.jupiter.api.Test;

/** Answers and errors as data, without a wire. */
class AnswerTest {
  private static StreamChatResponse delta(Delta.Builder delta) {
    return StreamChatResponse.newBuilder().setDelta(delta).build();
  }

  private static StreamChatResponse call(int index, String id, String name, String arguments) {
    return delta(
        Delta.newBuilder()
            .addToolCalls(
                ToolCallDelta.newBuilder()
                    .setIndex(index)
                    .setId(id)
                    .setName(name)
                    .setArguments(arguments)));
  }

  // --- accumulation

  @Test
  void toolCallsAreAssembled() {
    Accumulator answer = new Accumulator();
    answer.add(call(1, "b", "second", "{\"x\""));
    answer.add(call(0, "a", "first", ""));
    answer.add(call(1, "late", "other", ":1}"));
    List<ToolCall> calls = answer.toolCalls();
    assertEquals(List.of("a", "b"), calls.stream().map(ToolCall::id).toList());
    assertEquals(List.of("first", "second"), calls.stream().map(ToolCall::name).toList());
    assertEquals(Map.of("x", 1L), calls.get(1).arguments());
    assertEquals(Map.of(), calls.get(0).arguments(), "no text, no arguments");
    assertFalse(answer.message().proto().hasContent(), "only calls: null, not empty");
  }

  @Test
  void aCustomCallHasInput() {
    Accumulator answer = new Accumulator();
    answer.add(
        delta(
            Delta.newBuilder()
                .addToolCalls(
                    ToolCallDelta.newBuilder().setCustom(true).setName("g").setArguments("a"))));
    answer.add(call(0, "", "", "b"));
    ToolCall call = answer.toolCalls().get(0);
    assertTrue(call.isCustom());
    assertEquals("ab", call.rawArguments());
    assertThrows(InvalidJsonException.class, call::arguments);
  }

  @Test
  void whatIsNotModelledGrowsToo() {
    Accumulator answer = new Accumulator();
    answer.add(
        delta(Delta.newBuilder().setExtraJson("{\"a\":\"x\",\"l\":[1],\"o\":{\"n\":null}}")));
    answer.add(delta(Delta.newBuilder().setExtraJson("not json")));
    answer.add(delta(Delta.newBuilder().setExtraJson("{\"a\":\"y\",\"l\":[2],\"o\":{\"n\":3}}")));
    assertEquals(
        "{\"a\":\"xy\",\"l\":[1,2],\"o\":{\"n\":3}}", answer.message().proto().getExtraJson());
    answer.add(
        StreamChatResponse.newBuilder()
            .setTrailer(StreamTrailer.newBuilder().setExtraJson("{\"late\":1}"))
            .build());
    assertEquals("{\"late\":1}", answer.reply().proto().getHeader().getExtraJson());
    assertFalse(answer.reply().proto().hasUsage(), "nobody reported it");
  }

  @Test
  void logprobsAndAnnotationsAreKept() {
    Accumulator answer = new Accumulator();
    for (String each : List.of("a", "b")) {
      Delta.Builder delta = Delta.newBuilder().setContent(each);
      delta.addLogprobsBuilder().setToken(each);
      delta.addAnnotationsBuilder().setUrl(each);
      answer.add(delta(delta));
    }
    var choice = answer.first().proto();
    assertEquals(
        List.of("a", "b"), choice.getLogprobsList().stream().map(each -> each.getToken()).toList());
    assertEquals(
        List.of("a", "b"),
        choice.getMessage().getAnnotationsList().stream().map(each -> each.getUrl()).toList());
  }

  @Test
  void snapshotsReplace() {
    Accumulator answer = new Accumulator();
    StringBuilder text = new StringBuilder();
    for (String each : List.of("", "He", "Hello")) {
      Snapshot snapshot =
          Snapshot.newBuilder()
              .setMessage(ChatMessage.newBuilder().setRole("assistant").setContent(each))
              .build();
      text.append(
          answer
              .add(StreamChatResponse.newBuilder().setSnapshot(snapshot).build())
              .orElseThrow()
              .text());
    }
    assertEquals("Hello", text.toString());
    assertEquals("Hello", answer.text());
  }

  @Test
  void whatIsNewerIsIgnored() throws Exception {
    Accumulator answer = new Accumulator();
    assertTrue(answer.add(StreamChatResponse.getDefaultInstance()).isEmpty());
    byte[] unknown = {(byte) 0xfa, 0x01, 0x01, 0x41}; // field 31
    assertTrue(answer.add(StreamChatResponse.parseFrom(unknown)).isEmpty());
    answer.add(
        StreamChatResponse.newBuilder()
            .setFinish(Finish.newBuilder().setFinishReasonValue(99).setFinishReasonRaw("odd"))
            .build());
    assertEquals(FinishReason.OTHER, answer.finishReason());
    assertEquals("odd", answer.first().proto().getFinishReasonRaw());
    assertFalse(answer.isComplete());
    assertEquals("", new Accumulator().text());
    assertEquals(FinishReason.UNFINISHED, new Accumulator().finishReason());
  }

  @Test
  void everyFinishReasonOfTheContractHasItsName() {
    for (io.tokenwire.v1.FinishReason each : io.tokenwire.v1.FinishReason.values()) {
      if (each != io.tokenwire.v1.FinishReason.UNRECOGNIZED) {
        assertEquals(each, FinishReason.of(each).proto());
      }
    }
  }

  // --- JSON

  private record Query(String city, int days) {}

  private static ToolCall asked(String arguments) {
    return new ToolCall(
        io.tokenwire.v1.ToolCall.newBuilder()
            .setId("c1")
            .setFunction(FunctionCall.newBuilder().setName("f").setArgumentsJson(arguments))
            .build(),
        JsonCodec.gson());
  }

  @Test
  void argumentsAreParsed() {
    ToolCall call = asked("{\"city\":\"Rome\",\"days\":3}");
    assertEquals(Map.of("city", "Rome", "days", 3L), call.arguments());
    assertEquals(new Query("Rome", 3), call.arguments(Query.class));
    assertEquals(
        Map.of("a", 1.5, "b", new BigInteger("123456789012345678901234567890")),
        asked("{\"a\":1.5,\"b\":123456789012345678901234567890}").arguments());
  }

  @Test
  void nonsenseIsRefusedAndShown() {
    for (String text : List.of("{\"ci", "[1]", "null", "{} x", "{a:1}", "3", "[".repeat(50_000))) {
      InvalidJsonException e =
          assertThrows(InvalidJsonException.class, () -> asked(text).arguments(), text);
      assertEquals(text, e.text());
      assertTrue(e.getMessage().contains("'f' (c1)"), e.getMessage());
      assertTrue(e.getMessage().length() < 200);
    }
    assertThrows(
        InvalidJsonException.class, () -> asked("{\"days\":\"x\"}").arguments(Query.class));
  }

  @Test
  void aToolIsAnswered() {
    Message answer = asked("{}").answer(Map.of("degrees", 21));
    assertEquals("tool", answer.role());
    assertEquals("c1", answer.proto().getToolCallId());
    assertEquals("{\"degrees\":21}", answer.text());
    assertEquals("as is", asked("{}").answer("as is").text());
  }

  // --- errors

  private static final Metadata.Key<byte[]> DETAILS =
      Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

  private static TokenwireException error(Status status, Metadata trailers) {
    return TokenwireException.of(status, trailers, "sent", null);
  }

  @Test
  void aBareStatusIsAnErrorToo() {
    TokenwireException e = error(Status.UNAVAILABLE, new Metadata());
    assertEquals("", e.reason());
    assertEquals(0, e.attempts());
    assertEquals("sent", e.requestId());
    assertEquals("UNAVAILABLE: no message (request sent)", e.getMessage());
    assertTrue(e.retryAfter().isEmpty());
    assertTrue(e.partial().isEmpty());
  }

  @Test
  void theRequestIdIsTheOneInTheGatewaysLog() {
    Metadata trailers = new Metadata();
    trailers.put(TokenwireException.REQUEST_ID, "echoed");
    assertEquals("echoed", error(Status.INTERNAL, trailers).requestId());
    ErrorInfo info =
        ErrorInfo.newBuilder().setDomain("tokenwire").putMetadata("requestId", "told").build();
    trailers.put(
        DETAILS,
        com.google.rpc.Status.newBuilder().addDetails(Any.pack(info)).build().toByteArray());
    assertEquals("told", error(Status.INTERNAL, trailers).requestId());
  }

  @Test
  void strangersAndDamagedDetailsDoNoHarm() {
    Metadata trailers = new Metadata();
    trailers.put(DETAILS, new byte[] {1, 2, 3});
    assertEquals(Status.Code.NOT_FOUND, error(Status.NOT_FOUND, trailers).code());
    ErrorInfo info = ErrorInfo.newBuilder().setReason("X").setDomain("other").build();
    Any damaged =
        Any.newBuilder()
            .setTypeUrl("type.googleapis.com/google.rpc.ErrorInfo")
            .setValue(ByteString.copyFrom(new byte[] {(byte) 0xff}))
            .build();
    trailers.discardAll(DETAILS);
    trailers.put(
        DETAILS,
        com.google.rpc.Status.newBuilder()
            .setCode(5)
            .addDetails(damaged)
            .addDetails(Any.pack(info))
            .build()
            .toByteArray());
    assertEquals("", error(Status.NOT_FOUND, trailers).reason());
  }

  @Test
  void pushbackTellsWhenRetryInfoDoesNot() {
    Metadata trailers = new Metadata();
    trailers.put(Pushback.GRPC, "1500");
    TokenwireException e = error(Status.RESOURCE_EXHAUSTED, trailers);
    assertEquals(1500, e.retryAfter().orElseThrow().toMillis());
    assertTrue(e.isRetryable());
    for (String nothing : List.of("-1", "0", "x", "99999999999999999999")) {
      trailers.discardAll(Pushback.GRPC);
      trailers.put(Pushback.GRPC, nothing);
      assertTrue(error(Status.RESOURCE_EXHAUSTED, trailers).retryAfter().isEmpty());
      assertFalse(error(Status.RESOURCE_EXHAUSTED, trailers).isRetryable());
    }
  }

  @Test
  void onlySomeCodesAreRetryable() {
    for (Status.Code code : Status.Code.values()) {
      if (code != Status.Code.OK) {
        assertEquals(
            code == Status.Code.UNAVAILABLE,
            error(code.toStatus(), new Metadata()).isRetryable(),
            code::name);
      }
    }
  }

  @Test
  void aStreamWhoseConnectionBrokeWasInterrupted() {
    Accumulator part = new Accumulator();
    Status broken = Status.UNAVAILABLE.withDescription("io exception");
    Metadata none = new Metadata();
    // Nothing of an answer had come.
    assertEquals("", TokenwireException.of(broken, none, "r", part.reply()).reason());
    part.add(delta(Delta.newBuilder().setContent("Hel")));
    assertEquals(
        "UPSTREAM_STREAM_INTERRUPTED",
        TokenwireException.of(broken, none, "r", part.reply()).reason());
    assertEquals("", TokenwireException.of(Status.CANCELLED, none, "r", part.reply()).reason());
  }

  @Test
  void anErrorIsSerialized() throws Exception {
    Accumulator part = new Accumulator();
    part.add(delta(Delta.newBuilder().setContent("Hel")));
    TokenwireException e = TokenwireException.incomplete("cut", "r", part.reply());
    ByteArrayOutputStream bytes = new ByteArrayOutputStream();
    try (ObjectOutputStream out = new ObjectOutputStream(bytes)) {
      out.writeObject(e);
    }
    try (ObjectInputStream in =
        new ObjectInputStream(new ByteArrayInputStream(bytes.toByteArray()))) {
      TokenwireException again = (TokenwireException) in.readObject();
      assertEquals("Hel", again.partialText());
      assertEquals(e.getMessage(), again.getMessage());
    }
  }

  @Test
  void theFakeKnowsEveryReasonAndItsCode() throws Exception {
    String text = Files.readString(Path.of("../../protos/tokenwire/v1/error_reason.proto"));
    Map<String, String> reasons =
        java.util.regex.Pattern.compile(
                "((?:^ *//[^\\n]*\\n)+) *ERROR_REASON_(\\w+) = \\d+;",
                java.util.regex.Pattern.MULTILINE)
            .matcher(text)
            .results()
            .filter(found -> !found.group(2).equals("UNSPECIFIED"))
            .collect(Collectors.toMap(found -> found.group(2), found -> found.group(1)));
    assertEquals(27, reasons.size());
    reasons.forEach(
        (reason, comment) -> {
          String code = FailureCodes.of(reason);
          assertTrue(comment.contains(code), reason + ": " + code);
        });
    assertThrows(IllegalArgumentException.class, () -> Failure.of("NO_SUCH"));
  }

  /** The code of a reason, as a caller sees it. */
  private static final class FailureCodes {
    private FailureCodes() {}

    static String of(String reason) {
      try (var gateway = new io.tokenwire.testing.FakeGateway();
          TokenwireClient client =
              TokenwireClient.builder(gateway.target())
                  .channelCustomizer(channel -> channel.disableRetry())
                  .build()) {
        gateway.fail(reason);
        TokenwireException e =
            assertThrows(
                TokenwireException.class, () -> client.chat(c -> c.model("any").user("Hi")));
        assertEquals(reason, e.reason());
        return e.code().name();
      }
    }
  }
}

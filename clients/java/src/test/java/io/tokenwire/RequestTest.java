package io.tokenwire;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.tokenwire.v1.ChatRequest;
import io.tokenwire.v1.GenerationParams;
import io.tokenwire.v1.UnsupportedParameterPolicy;
import java.lang.reflect.Method;
import java.lang.reflect.Modifier;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyFactory;
import java.security.KeyPairGenerator;
import java.security.PrivateKey;
import java.security.interfaces.ECPrivateKey;
import java.security.spec.ECGenParameterSpec;
import java.security.spec.PKCS8EncodedKeySpec;
import java.time.Duration;
import java.util.Arrays;
import java.util.Base64;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;

/** What is asked, and what is refused before anything is sent. */
class RequestTest {
  private static String refused(Runnable what) {
    return assertThrows(IllegalArgumentException.class, what::run).getMessage();
  }

  private static ChatParams.Builder hi() {
    return ChatParams.builder().model("any").user("Hi");
  }

  @Test
  void everyOptionReachesItsField() {
    Map<String, Object> schema = new LinkedHashMap<>();
    schema.put("z", 1);
    schema.put("a", null);
    ChatRequest request =
        hi().system("Be short.")
            .assistant("Hello.")
            .message(Message.user(Part.text("see"), Part.image(new byte[] {1}, "image/png")))
            .temperature(0)
            .topP(0.5)
            .topK(3)
            .minP(0.1)
            .maxCompletionTokens(9)
            .frequencyPenalty(1)
            .presencePenalty(2)
            .repetitionPenalty(1.5)
            .seed(1L << 40)
            .choiceCount(2)
            .logprobs(true)
            .topLogprobs(4)
            .enableThinking(false)
            .parallelToolCalls(true)
            .reasoningEffort("low")
            .verbosity("high")
            .stop("a", "b")
            .logitBias(Map.of(7, -1.5))
            .tools(Tool.function("f", "does", schema).strict(), Tool.custom("g", "free"))
            .toolChoice(ToolChoice.tool("f"))
            .jsonSchema("answer", schema)
            .roleTemplate("environment", "system", "<", ">")
            .endUserId("u")
            .promptCacheKey("k")
            .serviceTier("flex")
            .dropUnsupportedParameters(true)
            .label("team", "a")
            .extraBody(Map.of("x", "<é>"))
            .build()
            .proto();
    assertEquals(4, request.getMessagesCount());
    assertEquals("image/png", request.getMessages(3).getParts(1).getImage().getMediaType());
    Set<String> unset =
        GenerationParams.getDescriptor().getFields().stream()
            .filter(field -> !request.getParams().getAllFields().containsKey(field))
            .map(field -> field.getName())
            .collect(Collectors.toSet());
    assertEquals(Set.of(), unset, "an option for each parameter of the contract");
    Set<String> missing =
        ChatRequest.getDescriptor().getFields().stream()
            .filter(field -> !request.getAllFields().containsKey(field))
            .map(field -> field.getName())
            .collect(Collectors.toSet());
    assertEquals(Set.of(), missing, "an option for each field of the contract");
    assertTrue(request.getParams().hasTemperature(), "zero is a value");
    assertEquals(
        "{\"z\":1,\"a\":null}", request.getTools(0).getFunction().getParametersSchemaJson());
    assertTrue(request.getTools(0).getFunction().getStrict());
    assertEquals(List.of("f"), request.getToolChoice().getToolNamesList());
    assertEquals("{\"x\":\"<é>\"}", request.getExtraBodyJson());
    assertEquals(
        UnsupportedParameterPolicy.UNSUPPORTED_PARAMETER_POLICY_DROP,
        request.getUnsupportedParameterPolicy());
  }

  @Test
  void jsonIsAskedForInThreeWays() {
    var plain = hi().jsonSchema("a", "{}").build().proto().getResponseFormat().getJsonSchema();
    assertFalse(plain.getStrict());
    var strict = hi().strictJsonSchema("a", "{}").build().proto().getResponseFormat();
    assertEquals(plain.toBuilder().setStrict(true).build(), strict.getJsonSchema());
    assertTrue(hi().jsonObject().build().proto().getResponseFormat().hasJsonObject());
  }

  @Test
  void aParamsIsAValue() {
    ChatParams params = hi().build();
    assertEquals(params, ChatParams.of(params.proto()));
    assertEquals(params.hashCode(), hi().build().hashCode());
    ChatParams more = params.toBuilder().user("And?").build();
    assertEquals(1, params.proto().getMessagesCount());
    assertEquals(2, more.proto().getMessagesCount());
    assertFalse(params.toString().contains("Hi"));
  }

  @Test
  void whatMakesNoSenseIsRefusedWithItsPlace() {
    assertTrue(refused(() -> ChatParams.builder().user("Hi").build()).startsWith("model: "));
    assertTrue(refused(() -> ChatParams.builder().model("m").build()).startsWith("messages: "));
    assertTrue(refused(() -> hi().user(null)).contains("null"));
    assertTrue(refused(() -> hi().user("a\ud83d")).contains("surrogate pair at position 1"));
    assertTrue(refused(() -> hi().user("\ude00a")).contains("position 0"));
    assertEquals("😀", hi().user("😀").build().proto().getMessages(1).getContent());
    assertTrue(refused(() -> Message.of("", "x")).startsWith("role: "));
    assertTrue(refused(() -> Message.user(new Part[0])).startsWith("parts: "));
    assertTrue(refused(() -> Part.image(new byte[1], "")).startsWith("mediaType: "));
    assertTrue(refused(() -> hi().extraBody(Map.of("x", Double.NaN))).startsWith("extraBody: "));
    assertTrue(refused(() -> BatchParams.builder().build()).startsWith("items: "));
    assertTrue(
        refused(() -> BatchParams.builder().prompt("no model")).startsWith("items[0]: model: "));
    assertThrows(IllegalStateException.class, () -> Tool.custom("g", "").strict());
  }

  @Test
  void optionsOfACallAreChecked() {
    RequestOptions.Builder options = RequestOptions.builder();
    assertTrue(refused(() -> options.timeout(Duration.ZERO)).startsWith("timeout: "));
    assertTrue(refused(() -> options.requestId("")).startsWith("requestId: "));
    assertTrue(refused(() -> options.requestId("a\nb")).startsWith("requestId: "));
    assertTrue(
        refused(() -> options.metadata("Authorization", "x")).contains("has its own option"));
    assertTrue(refused(() -> options.metadata("x-bin", "x")).startsWith("metadata: "));
    assertTrue(refused(() -> options.metadata("a b", "x")).startsWith("metadata: "));
    try (TokenwireClient client = TokenwireClient.builder("localhost:1").build()) {
      RequestOptions ofStreams = RequestOptions.builder().cumulative(true).build();
      assertTrue(refused(() -> client.chat(hi().build(), ofStreams)).startsWith("cumulative"));
    }
  }

  // --- connecting

  @Test
  void aTokenIsNeverShown() {
    for (String bad : List.of("se cret", "secret\n", "sécret")) {
      String said = refused(() -> TokenwireClient.builder("localhost:1").token(bad));
      assertTrue(said.startsWith("token: "), said);
      assertFalse(said.contains("cret"), said);
    }
    TokenwireClient.Builder fromEnvironment =
        new TokenwireClient.Builder("localhost:1", Map.of("TOKENWIRE_TOKEN", "se cret"));
    assertFalse(refused(fromEnvironment::build).contains("cret"));
    try (TokenwireClient client =
        TokenwireClient.builder("localhost:1").token(() -> "se cret").build()) {
      assertFalse(refused(() -> client.chat(hi().build())).contains("cret"));
    }
  }

  @Test
  void addressesAreChecked() {
    for (String scheme : List.of("http", "https", "grpc", "GRPCS")) {
      String said = refused(() -> TokenwireClient.builder(scheme + "://host:1").build());
      assertTrue(said.contains("without a scheme"), said);
    }
    assertTrue(refused(() -> TokenwireClient.builder("").build()).startsWith("target: "));
    TokenwireClient.builder("dns:///localhost:1").build().close();
  }

  @Test
  void theEnvironmentTellsWhereNobodyElseDoes() {
    assertEquals("b:2", authority(null, Map.of("TOKENWIRE_TARGET", "b:2")));
    assertEquals("a:1", authority("a:1", Map.of("TOKENWIRE_TARGET", "b:2")));
    assertEquals("localhost:50051", authority(null, Map.of("TOKENWIRE_TARGET", "")));
    assertEquals("localhost:50051", authority(null, Map.of()));
  }

  private static String authority(String target, Map<String, String> environment) {
    try (TokenwireClient client = new TokenwireClient.Builder(target, environment).build()) {
      return client.channel().authority();
    }
  }

  @Test
  void missingCertificatesAreTold() {
    Path nowhere = Path.of("no-such-file.pem");
    TokenwireClient.Builder builder = TokenwireClient.builder("localhost:1");
    for (Runnable what :
        List.<Runnable>of(
            () -> builder.tls(nowhere), () -> builder.mutualTls(nowhere, nowhere, nowhere))) {
      assertTrue(
          assertThrows(java.io.UncheckedIOException.class, what::run)
              .getMessage()
              .contains("no-such-file.pem"));
    }
  }

  /** Both older forms, made here by unwrapping what the JDK makes. */
  @Test
  void olderPrivateKeysAreRead() throws Exception {
    KeyPairGenerator rsa = KeyPairGenerator.getInstance("RSA");
    rsa.initialize(2048);
    byte[] key = rsa.generateKeyPair().getPrivate().getEncoded();
    // SEQUENCE (4), version (3), algorithm (15), the header of OCTETS (4): PKCS #1 is the rest.
    assertArrayEquals(key, unwrapped(pem("RSA", Arrays.copyOfRange(key, 26, key.length))));

    KeyPairGenerator curve = KeyPairGenerator.getInstance("EC");
    curve.initialize(new ECGenParameterSpec("secp256r1"));
    PrivateKey secret = curve.generateKeyPair().getPrivate();
    byte[] wrapped = secret.getEncoded(); // it ends with the version and the key of SEC 1
    byte[] name = {(byte) 0xa0, 10, 6, 8, 0x2a, (byte) 0x86, 0x48, (byte) 0xce, 0x3d, 3, 1, 7};
    byte[] inner = Arrays.copyOfRange(wrapped, wrapped.length - 37, wrapped.length);
    byte[] sec1 = new byte[2 + 37 + name.length];
    sec1[0] = 0x30;
    sec1[1] = (byte) (37 + name.length);
    System.arraycopy(inner, 0, sec1, 2, 37);
    System.arraycopy(name, 0, sec1, 39, name.length);
    PrivateKey again =
        KeyFactory.getInstance("EC")
            .generatePrivate(new PKCS8EncodedKeySpec(unwrapped(pem("EC", sec1))));
    assertEquals(((ECPrivateKey) secret).getS(), ((ECPrivateKey) again).getS());

    byte[] other = "-----BEGIN PRIVATE KEY-----".getBytes(StandardCharsets.US_ASCII);
    assertArrayEquals(other, PrivateKeyPem.pkcs8(other));
    String said = refused(() -> PrivateKeyPem.pkcs8(pem("EC", new byte[] {0x30, 3, 2, 1})));
    assertEquals("key: the PEM file is damaged", said);
  }

  private static byte[] pem(String kind, byte[] der) {
    return ("-----BEGIN "
            + kind
            + " PRIVATE KEY-----\n"
            + Base64.getMimeEncoder().encodeToString(der)
            + "\n-----END "
            + kind
            + " PRIVATE KEY-----\n")
        .getBytes(StandardCharsets.US_ASCII);
  }

  private static byte[] unwrapped(byte[] pem) {
    String text = new String(PrivateKeyPem.pkcs8(pem), StandardCharsets.US_ASCII);
    assertTrue(text.startsWith("-----BEGIN PRIVATE KEY-----\n"));
    return Base64.getMimeDecoder().decode(text.replaceAll("-----[A-Z ]+-----", ""));
  }

  @Test
  void everyMethodOfTheContractIsRetriedByName() throws Exception {
    Set<String> listed = new TreeSet<>();
    String config = Endpoint.serviceConfig().toString();
    try (Stream<Path> protos = Files.list(Path.of("../../protos/tokenwire/v1"))) {
      for (Path proto : protos.toList()) {
        Files.readString(proto)
            .lines()
            .filter(line -> line.startsWith("  rpc "))
            .forEach(line -> listed.add(line.strip().substring(4, line.strip().indexOf('('))));
      }
    }
    assertEquals(7, listed.size());
    for (String method : listed) {
      assertTrue(config.contains("method=" + method), method);
    }
    assertTrue(config.contains("round_robin"));
  }

  @Test
  void theVersionIsThePoms() throws Exception {
    assertTrue(
        Files.readString(Path.of("pom.xml"))
            .contains("<artifactId>tokenwire</artifactId>\n  <version>" + Endpoint.VERSION));
  }

  @Test
  void noSignatureShowsWhatIsNotPublic() {
    for (Class<?> type : List.of(TokenwireClient.class, ChatStream.class, Reply.class)) {
      for (Method method : type.getDeclaredMethods()) {
        if (Modifier.isPublic(method.getModifiers())) {
          assertTrue(Modifier.isPublic(method.getReturnType().getModifiers()), method::toString);
        }
      }
    }
  }
}

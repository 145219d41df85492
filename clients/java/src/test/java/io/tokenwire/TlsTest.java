package io.tokenwire;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.grpc.Context;
import io.grpc.Contexts;
import io.grpc.Grpc;
import io.grpc.Metadata;
import io.grpc.Server;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerInterceptor;
import io.grpc.Status;
import io.grpc.TlsChannelCredentials;
import io.grpc.TlsServerCredentials;
import io.grpc.stub.StreamObserver;
import io.tokenwire.testing.FakeGateway;
import io.tokenwire.v1.ChatRequest;
import io.tokenwire.v1.ChatResponse;
import io.tokenwire.v1.ChatServiceGrpc;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import java.security.cert.Certificate;
import java.security.cert.X509Certificate;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Base64;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import java.util.logging.Level;
import java.util.logging.Logger;
import javax.net.ssl.SSLSession;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** TLS and mutual TLS over real sockets, with certificates made here. */
class TlsTest {
  @TempDir private static Path folder;

  /** PEM files of a certificate and of its key. */
  private record Identity(Path certificate, Path key) {}

  private static Path authority;
  private static Path stranger;
  private static Identity localhost;
  private static Identity elsewhere;
  private static Identity caller;
  private static Identity forged;

  // --- certificates

  @BeforeAll
  static void makeCertificates() throws Exception {
    CompletableFuture<Void> beside =
        CompletableFuture.runAsync(
            () -> {
              generate("stranger", "ca", "-ext", "bc:critical=ca:true");
              generate("stranger", "caller", "-signer", "ca");
            });
    generate("authority", "ca", "-ext", "bc:critical=ca:true");
    generate("authority", "localhost", "-signer", "ca", "-ext", "san=dns:localhost,ip:127.0.0.1");
    generate("authority", "elsewhere", "-signer", "ca", "-ext", "san=dns:elsewhere.example");
    generate("authority", "caller", "-signer", "ca");
    beside.join();
    authority = identity("authority", "ca").certificate();
    stranger = identity("stranger", "ca").certificate();
    localhost = identity("authority", "localhost");
    elsewhere = identity("authority", "elsewhere");
    caller = identity("authority", "caller");
    forged = identity("stranger", "caller");
  }

  /** The JDK makes certificates with no other than this tool. */
  private static void generate(String store, String alias, String... more) {
    List<String> words =
        new ArrayList<>(
            List.of(
                Path.of(System.getProperty("java.home"), "bin", "keytool").toString(),
                "-J-XX:TieredStopAtLevel=1",
                "-genkeypair",
                "-keystore",
                folder.resolve(store).toString(),
                "-storepass",
                "secret",
                "-alias",
                alias,
                "-dname",
                "CN=" + alias,
                "-keyalg",
                alias.equals("caller") ? "RSA" : "EC"));
    words.addAll(List.of(more));
    Path said = folder.resolve(store + ".log");
    try {
      Process process =
          new ProcessBuilder(words).redirectErrorStream(true).redirectOutput(said.toFile()).start();
      assertEquals(0, process.waitFor(), Files.readString(said));
    } catch (IOException | InterruptedException e) {
      throw new AssertionError(e);
    }
  }

  private static Identity identity(String store, String alias) throws Exception {
    KeyStore keys = KeyStore.getInstance(folder.resolve(store).toFile(), "secret".toCharArray());
    StringBuilder chain = new StringBuilder();
    for (Certificate each : keys.getCertificateChain(alias)) {
      chain.append(pem("CERTIFICATE", each.getEncoded()));
    }
    byte[] key = keys.getKey(alias, "secret".toCharArray()).getEncoded();
    Path certificate = folder.resolve(store + "-" + alias + ".pem");
    Files.writeString(certificate, chain);
    return new Identity(
        certificate,
        Files.writeString(folder.resolve(store + "-" + alias + ".key"), pem("PRIVATE KEY", key)));
  }

  private static String pem(String kind, byte[] der) {
    String text = Base64.getMimeEncoder(64, new byte[] {'\n'}).encodeToString(der);
    return "-----BEGIN " + kind + "-----\n" + text + "\n-----END " + kind + "-----\n";
  }

  // --- gateways

  /** A gateway behind TLS that answers "ok", and writes down who asked with which token. */
  private static final class Encrypted extends ChatServiceGrpc.ChatServiceImplBase
      implements AutoCloseable {
    private final List<String> saw = new CopyOnWriteArrayList<>();
    private final Server server;

    Encrypted(Identity identity, Path callers) throws IOException {
      TlsServerCredentials.Builder credentials =
          TlsServerCredentials.newBuilder()
              .keyManager(identity.certificate().toFile(), identity.key().toFile());
      if (callers != null) {
        credentials
            .trustManager(callers.toFile())
            .clientAuth(TlsServerCredentials.ClientAuth.REQUIRE);
      }
      server =
          Grpc.newServerBuilderForPort(0, credentials.build())
              .addService(this)
              .intercept(
                  new ServerInterceptor() {
                    @Override
                    public <Q, R> ServerCall.Listener<Q> interceptCall(
                        ServerCall<Q, R> call, Metadata headers, ServerCallHandler<Q, R> next) {
                      saw.add(name(call) + headers.get(AUTHORIZATION));
                      return Contexts.interceptCall(Context.current(), call, headers, next);
                    }
                  })
              .build()
              .start();
    }

    private static final Metadata.Key<String> AUTHORIZATION =
        Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

    private static String name(ServerCall<?, ?> call) {
      SSLSession session = call.getAttributes().get(Grpc.TRANSPORT_ATTR_SSL_SESSION);
      try {
        X509Certificate shown = (X509Certificate) session.getPeerCertificates()[0];
        return shown.getSubjectX500Principal().getName() + " ";
      } catch (javax.net.ssl.SSLPeerUnverifiedException e) {
        return "";
      }
    }

    @Override
    public void chat(ChatRequest request, StreamObserver<ChatResponse> out) {
      ChatResponse.Builder response = ChatResponse.newBuilder();
      response.addChoicesBuilder().getMessageBuilder().setContent("ok");
      out.onNext(response.build());
      out.onCompleted();
    }

    @Override
    public void close() {
      server.shutdownNow();
      try {
        server.awaitTermination(5, TimeUnit.SECONDS);
      } catch (InterruptedException e) {
        Thread.currentThread().interrupt();
      }
    }
  }

  private static String ask(String target, Consumer<TokenwireClient.Builder> tls) {
    TokenwireClient.Builder builder = TokenwireClient.builder(target).token("secret");
    tls.accept(builder);
    RequestOptions options = RequestOptions.builder().timeout(Duration.ofSeconds(20)).build();
    try (TokenwireClient client = builder.build()) {
      return client.chat(c -> c.model("any").user("Hi"), options).text();
    }
  }

  private static String ask(Encrypted gateway, Consumer<TokenwireClient.Builder> tls) {
    return ask("localhost:" + gateway.server.getPort(), tls);
  }

  /** What the error of a call tells that could not be made. */
  private static String refused(Encrypted gateway, Consumer<TokenwireClient.Builder> tls) {
    TokenwireException e = assertThrows(TokenwireException.class, () -> ask(gateway, tls));
    assertEquals(Status.Code.UNAVAILABLE, e.code(), e::getMessage);
    assertEquals("", e.reason());
    assertTrue(e.isRetryable());
    return e.getMessage();
  }

  // --- TLS

  private static final Logger TALKATIVE =
      Logger.getLogger("io.grpc.netty.shaded.io.grpc.netty.NettyServerTransport");

  @Test
  void anAuthorityOfOnesOwnByNameAndByAddressWithTheToken() throws Exception {
    try (Encrypted gateway = new Encrypted(localhost, null)) {
      assertEquals("ok", ask(gateway, b -> b.tls(authority)));
      assertEquals("ok", ask("127.0.0.1:" + gateway.server.getPort(), b -> b.tls(authority)));
      assertEquals(
          "ok",
          ask(
              gateway,
              b -> {
                try {
                  b.tls(
                      TlsChannelCredentials.newBuilder().trustManager(authority.toFile()).build());
                } catch (IOException e) {
                  throw new AssertionError(e);
                }
              }));
      assertEquals(List.of("Bearer secret", "Bearer secret", "Bearer secret"), gateway.saw);
    }
  }

  @Test
  void aStrangersCertificateGetsNoCallAndNoToken() throws Exception {
    try (Encrypted gateway = new Encrypted(localhost, null)) {
      for (Consumer<TokenwireClient.Builder> tls :
          List.<Consumer<TokenwireClient.Builder>>of(b -> b.tls(stranger), b -> b.tls())) {
        String said = refused(gateway, tls);
        assertTrue(said.contains("certification path") || said.contains("Signature"), said);
        assertFalse(said.contains("secret"));
      }
      assertEquals(List.of(), gateway.saw);
    }
  }

  @Test
  void aCertificateForAnotherNameIsRefusedUnlessThatNameIsMeant() throws Exception {
    try (Encrypted gateway = new Encrypted(elsewhere, null)) {
      String said = refused(gateway, b -> b.tls(authority));
      assertTrue(said.contains("localhost"), said);
      assertEquals(List.of(), gateway.saw);
      assertEquals(
          "ok",
          ask(
              gateway,
              b ->
                  b.tls(authority)
                      .channelCustomizer(c -> c.overrideAuthority("elsewhere.example"))));
    }
  }

  @Test
  void plaintextToTlsAndTlsToPlaintextAreErrors() throws Exception {
    TALKATIVE.setLevel(
        Level.WARNING); // the server tells of what came in place of HTTP/2, at length
    try (Encrypted gateway = new Encrypted(localhost, null);
        FakeGateway plain = new FakeGateway()) {
      refused(gateway, b -> {});
      TokenwireException e =
          assertThrows(TokenwireException.class, () -> ask(plain.target(), b -> b.tls(authority)));
      assertEquals(Status.Code.UNAVAILABLE, e.code());
      assertEquals(List.of(), gateway.saw);
      assertEquals(List.of(), plain.calls());
    }
  }

  /** Which those are, Java reads when it is first asked. */
  @Test
  void theSystemsAuthoritiesAreTrusted() throws Exception {
    KeyStore trusted = KeyStore.getInstance("PKCS12");
    trusted.load(null, null);
    KeyStore made =
        KeyStore.getInstance(folder.resolve("authority").toFile(), "secret".toCharArray());
    trusted.setCertificateEntry("ca", made.getCertificate("ca"));
    Path file = folder.resolve("trusted");
    try (var out = Files.newOutputStream(file)) {
      trusted.store(out, "secret".toCharArray());
    }
    System.setProperty("javax.net.ssl.trustStore", file.toString());
    System.setProperty("javax.net.ssl.trustStorePassword", "secret");
    try (Encrypted gateway = new Encrypted(localhost, null)) {
      assertEquals("ok", ask(gateway, b -> b.tls()));
    } finally {
      System.clearProperty("javax.net.ssl.trustStore");
      System.clearProperty("javax.net.ssl.trustStorePassword");
    }
  }

  // --- mutual TLS

  @Test
  void whoHasACertificateOfTheAuthorityComesInAndNobodyElse() throws Exception {
    try (Encrypted gateway = new Encrypted(localhost, authority)) {
      assertEquals(
          "ok", ask(gateway, b -> b.mutualTls(authority, caller.certificate(), caller.key())));
      assertEquals(List.of("CN=caller Bearer secret"), gateway.saw);
      refused(gateway, b -> b.tls(authority));
      refused(gateway, b -> b.mutualTls(authority, forged.certificate(), forged.key()));
      refused(gateway, b -> b.mutualTls(stranger, caller.certificate(), caller.key()));
      assertEquals(1, gateway.saw.size());
    }
  }

  /** As `openssl genrsa -traditional` writes it: gRPC for Java does not read that form. */
  @Test
  void anOlderFormOfTheKeyDoesAsWell() throws Exception {
    byte[] pkcs8 =
        Base64.getMimeDecoder()
            .decode(Files.readString(caller.key()).replaceAll("-----[A-Z ]+-----", ""));
    byte[] pkcs1 = Arrays.copyOfRange(pkcs8, 26, pkcs8.length);
    Path key =
        Files.write(
            folder.resolve("older.key"),
            pem("RSA PRIVATE KEY", pkcs1).getBytes(StandardCharsets.US_ASCII));
    try (Encrypted gateway = new Encrypted(localhost, authority)) {
      assertEquals("ok", ask(gateway, b -> b.mutualTls(authority, caller.certificate(), key)));
    }
  }

  @Test
  void aKeyOfAnotherCertificateIsTold() throws Exception {
    try (Encrypted gateway = new Encrypted(localhost, authority)) {
      String said =
          refused(gateway, b -> b.mutualTls(authority, caller.certificate(), forged.key()));
      assertTrue(said.contains("KEY_VALUES_MISMATCH"), said);
      assertEquals(List.of(), gateway.saw);
    }
  }
}

package io.tokenwire;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.tokenwire.testing.Delta;
import io.tokenwire.testing.Failure;
import io.tokenwire.testing.FakeGateway;
import java.io.ByteArrayOutputStream;
import java.io.File;
import java.io.IOException;
import java.io.PrintStream;
import java.io.StringWriter;
import java.lang.reflect.Method;
import java.net.URI;
import java.net.URL;
import java.net.URLClassLoader;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import javax.tools.JavaCompiler;
import javax.tools.JavaFileObject;
import javax.tools.SimpleJavaFileObject;
import javax.tools.StandardJavaFileManager;
import javax.tools.ToolProvider;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;

/** Every Java snippet of the README and every example is compiled and runs. */
class ReadmeTest {
  private record Section(Consumer<FakeGateway> script, String printed) {}

  private static final Delta WEATHER = Delta.toolCall("weather", Map.of("city", "Rome"));

  /** Per section: the script of the gateway, and what all its snippets together print. */
  private static final Map<String, Section> SECTIONS =
      Map.ofEntries(
          Map.entry("Connect", new Section(gateway -> {}, "ready\n")),
          Map.entry(
              "Ask",
              new Section(
                  gateway ->
                      gateway
                          .reply("Rayleigh.")
                          .reply("Short waves.")
                          .reply("Long way.")
                          .reply("{\"city\": \"Oslo\", \"degrees\": -3}"),
                  "Rayleigh.\nSTOP 6 fake\nLong way.\n-3.0\n")),
          Map.entry(
              "Stream",
              new Section(
                  gateway ->
                      gateway
                          .reply("Once", " upon")
                          .reply("a", " time")
                          .reply(", and", " so")
                          .reply(" on"),
                  "Once upon\ntrue 2 tokens\na time, and so on\n")),
          Map.entry(
              "Without waiting threads",
              new Section(
                  gateway -> gateway.reply("Rayleigh.").reply("Red", ".").reply("2").reply("4"),
                  "Rayleigh.\nRed. / Red.\n2\n4\n")),
          Map.entry(
              "Tools", new Section(gateway -> gateway.reply(WEATHER).reply("Yes."), "Yes.\n")),
          Map.entry(
              "Cancel",
              new Section(
                  gateway -> gateway.hang("one two three ", "four five six").reply("Hi!"),
                  "one two three four five six\norder-17\n")),
          Map.entry(
              "Errors",
              new Section(
                  gateway ->
                      gateway
                          .fail(
                              Failure.of("RATE_LIMITED")
                                  .retryAfter(Duration.ofMillis(1500))
                                  .metadata("requestId", "r"))
                          .fail(Failure.of("UPSTREAM_STREAM_INTERRUPTED"), "Once"),
                  "RESOURCE_EXHAUSTED\nRATE_LIMITED\nOptional[PT1.5S]\nr\n"
                      + "Once[UPSTREAM_STREAM_INTERRUPTED after 4 characters]\n")),
          Map.entry(
              "Retries",
              new Section(
                  gateway ->
                      gateway
                          .fail(Failure.of("RATE_LIMITED").retryAfter(Duration.ofMillis(10)))
                          .reply("Hi!"),
                  "Hi!\n")),
          Map.entry(
              "Batch",
              new Section(
                  gateway ->
                      gateway
                          .reply("2")
                          .reply("Oslo")
                          .reply("old")
                          .reply("2")
                          .reply("O")
                          .reply("o"),
                  "2 haiku old\n1  Oslo\n0  2\n2\nO\no\n")),
          Map.entry("Tokens", new Section(gateway -> {}, "3\n[0, 1, 2] How\n[gpt-4o-mini]\n")),
          Map.entry("Test your code", new Section(gateway -> {}, "")));

  /** Classes of each section, in the order of the README. */
  private static final Map<String, List<String>> CLASSES = new LinkedHashMap<>();

  @TempDir private static Path compiled;

  @BeforeAll
  static void compile() throws IOException {
    List<JavaFileObject> sources = new ArrayList<>();
    String text = Files.readString(Path.of("README.md"));
    String title = "";
    Matcher found =
        Pattern.compile(
                "^#{2,3} ([^\\n]*)$|^```java\\n(.*?)^```", Pattern.MULTILINE | Pattern.DOTALL)
            .matcher(text);
    while (found.find()) {
      if (found.group(1) != null) {
        title = found.group(1);
        continue;
      }
      String code = found.group(2);
      String name = "Snippet" + sources.size();
      Matcher own = Pattern.compile("^public class (\\w+)", Pattern.MULTILINE).matcher(code);
      if (own.find()) {
        name = own.group(1);
      } else {
        code = wrapped(name, code);
      }
      CLASSES.computeIfAbsent(title, unused -> new ArrayList<>()).add(name);
      sources.add(source(name, code));
    }
    try (Stream<Path> examples = Files.list(Path.of("examples"))) {
      for (Path example : examples.filter(each -> each.toString().endsWith(".java")).toList()) {
        String name = example.getFileName().toString().replace(".java", "");
        sources.add(source(name, Files.readString(example)));
      }
    }
    JavaCompiler compiler = ToolProvider.getSystemJavaCompiler();
    StringWriter said = new StringWriter();
    try (StandardJavaFileManager files = compiler.getStandardFileManager(null, null, null)) {
      List<String> options = List.of("-d", compiled.toString(), "-cp", classpath(), "-proc:none");
      boolean whole = compiler.getTask(said, files, null, options, null, sources).call();
      assertTrue(whole, said::toString);
    }
  }

  private static String classpath() {
    return System.getProperty(
        "surefire.test.class.path", System.getProperty("java.class.path", ""));
  }

  private static String wrapped(String name, String code) {
    Map<Boolean, List<String>> lines =
        code.lines().collect(Collectors.partitioningBy(line -> line.startsWith("import ")));
    return String.join("\n", lines.get(true))
        + "\nimport io.tokenwire.*;\nimport java.util.*;\npublic class "
        + name
        + " {\npublic static TokenwireClient client;\n"
        + "public static void run() throws Exception {\n"
        + String.join("\n", lines.get(false))
        + "\n}\n}\n";
  }

  private static JavaFileObject source(String name, String code) {
    return new SimpleJavaFileObject(
        URI.create("string:///" + name + ".java"), JavaFileObject.Kind.SOURCE) {
      @Override
      public CharSequence getCharContent(boolean ignored) {
        return code;
      }
    };
  }

  @Test
  void everySectionHasItsScript() {
    assertEquals(SECTIONS.keySet(), CLASSES.keySet());
  }

  static Stream<String> titles() {
    return SECTIONS.keySet().stream().sorted();
  }

  @ParameterizedTest
  @MethodSource("titles")
  void snippetsDoWhatTheySay(String title) throws Exception {
    ByteArrayOutputStream printed = new ByteArrayOutputStream();
    PrintStream before = System.out;
    try (URLClassLoader loader =
            new URLClassLoader(
                new URL[] {compiled.toUri().toURL()}, ReadmeTest.class.getClassLoader());
        FakeGateway gateway = new FakeGateway();
        TokenwireClient client = gateway.client()) {
      SECTIONS.get(title).script().accept(gateway);
      System.setOut(new PrintStream(printed, true, StandardCharsets.UTF_8));
      for (String name : CLASSES.get(title)) {
        Class<?> type = loader.loadClass(name);
        if (name.startsWith("Snippet")) {
          type.getField("client").set(null, client);
          type.getMethod("run").invoke(null);
          continue;
        }
        for (Method method : type.getDeclaredMethods()) {
          if (method.isAnnotationPresent(Test.class)) {
            method.setAccessible(true);
            method.invoke(type.getDeclaredConstructor().newInstance());
          }
        }
      }
    } finally {
      System.setOut(before);
    }
    assertEquals(SECTIONS.get(title).printed(), printed.toString(StandardCharsets.UTF_8));
  }

  // --- examples

  private record Ran(int code, String out, String err) {}

  private static Ran run(String example, FakeGateway gateway, String input) throws Exception {
    Path out = Files.createTempFile(compiled, "out", "");
    Path err = Files.createTempFile(compiled, "err", "");
    ProcessBuilder builder =
        new ProcessBuilder(
            Path.of(System.getProperty("java.home"), "bin", "java").toString(),
            "-XX:TieredStopAtLevel=1",
            "-XX:+UseSerialGC",
            "-cp",
            compiled + File.pathSeparator + classpath(),
            example);
    builder.environment().put("TOKENWIRE_TARGET", gateway.target());
    builder.environment().put("TOKENWIRE_TOKEN", "");
    Process process = builder.redirectOutput(out.toFile()).redirectError(err.toFile()).start();
    process.getOutputStream().write(input.getBytes(StandardCharsets.UTF_8));
    process.getOutputStream().close();
    if (!process.waitFor(60, TimeUnit.SECONDS)) {
      process.destroyForcibly();
    }
    return new Ran(process.waitFor(), Files.readString(out), Files.readString(err));
  }

  @Test
  void exampleConversation() throws Exception {
    try (FakeGateway gateway = new FakeGateway()) {
      gateway
          .reply("Hel", "lo")
          .fail(Failure.of("CONTENT_FILTERED").message("no"), "Wel")
          .reply("Bye");
      Ran ran = run("Conversation", gateway, "Hi\nWhat?\nBye\n");
      assertEquals("", ran.err());
      assertTrue(ran.out().startsWith("> Hello\n> Wel [CONTENT_FILTERED: no (request "), ran.out());
      assertTrue(ran.out().endsWith(")]\n> Bye\n> "), ran.out());
      assertEquals(
          List.of("Hi", "Hello", "What?", "Wel", "Bye"),
          gateway.calls().get(2).chat().getMessagesList().stream()
              .map(each -> each.getContent())
              .toList());
    }
  }

  @Test
  void exampleTools() throws Exception {
    try (FakeGateway gateway = new FakeGateway()) {
      gateway.reply(WEATHER, Delta.toolCall(1, "c2", "weather", "{\"ci")).reply("In Rome.");
      Ran ran = run("Tools", gateway, "");
      assertEquals("", ran.err());
      assertEquals("[weather({\"city\":\"Rome\"}) -> 21]", ran.out().lines().toList().get(1));
      assertTrue(ran.out().endsWith("In Rome.\n"), ran.out());
      var said = gateway.calls().get(1).chat().getMessagesList();
      assertTrue(said.get(said.size() - 1).getContent().contains("is not JSON"));
    }
  }

  @Test
  void exampleBatch() throws Exception {
    try (FakeGateway gateway = new FakeGateway()) {
      gateway.reply("one").fail(Failure.of("CONTENT_FILTERED").message("no")).reply("three");
      Ran ran = run("Batch", gateway, "1\n\n2\n3\n");
      assertEquals(1, ran.code());
      assertEquals("2\tthree\n0\tone\n", ran.out());
      assertTrue(ran.err().startsWith("1\tCONTENT_FILTERED: no (request "), ran.err());
    }
  }

  @Test
  void everyExampleIsRun() throws IOException {
    try (Stream<Path> examples = Files.list(Path.of("examples"))) {
      assertEquals(
          List.of("Batch.java", "Conversation.java", "Tools.java"),
          examples
              .map(each -> each.getFileName().toString())
              .filter(each -> each.endsWith(".java"))
              .sorted()
              .toList());
    }
  }
}

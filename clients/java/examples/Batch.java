import io.tokenwire.BatchParams;
import io.tokenwire.BatchResult;
import io.tokenwire.BatchStream;
import io.tokenwire.TokenwireClient;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.util.List;

/** Many questions at once, one per line of standard input; a table of answers and errors. */
public final class Batch {
  private Batch() {}

  /**
   * Asks them all.
   *
   * @param args the model, as wanted
   */
  public static void main(String[] args) {
    String model = args.length > 0 ? args[0] : "gpt-4o-mini";
    List<String> questions =
        new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8))
            .lines()
            .filter(line -> !line.isBlank())
            .toList();
    BatchParams.Builder batch =
        BatchParams.builder().defaults(chat -> chat.model(model).maxCompletionTokens(100));
    questions.forEach(batch::prompt);
    int failed = 0;
    try (TokenwireClient client = TokenwireClient.create();
        BatchStream results = client.batch(batch.build())) {
      for (BatchResult result : results) {
        if (result.reply().isPresent()) {
          System.out.println(result.index() + "\t" + result.get().text().replace("\n", "\\n"));
        } else {
          failed++;
          System.err.println(result.index() + "\t" + result.error().get().getMessage());
        }
      }
    }
    System.exit(failed > 0 ? 1 : 0);
  }
}

package example;

import java.time.Duration;
import java.time.Instant;
import java.util.Set;
import java.util.concurrent.ThreadLocalRandom;
import millrace.client.ApiClient;
import millrace.client.ApiException;
import millrace.client.api.DataPlaneApi;
import millrace.client.model.Order;
import millrace.client.model.OrderRequest;
import millrace.client.model.OrderRequestSkuId;
import millrace.client.model.OrderRequestUserId;

/** A click on "buy", placed once: the rules of docs/CLIENTS.md over the generated calls. */
public final class Buy {
  /** Under a key, repeating is safe whatever became of the request. No status (0): no answer came. */
  private static final Set<Integer> REPEATED = Set.of(0, 502, 503, 504);

  private final DataPlaneApi orders;

  /** {@code token}: that of {@code data_plane.token}; empty if none is set. */
  public Buy(String url, String token) {
    ApiClient client = new ApiClient();
    client.updateBaseUri(url);
    client.setConnectTimeout(Duration.ofSeconds(3));
    // Longer than orders.timeout_ms, so that the server's answer comes first.
    client.setReadTimeout(Duration.ofSeconds(10));
    if (!token.isEmpty()) {
      client.setRequestInterceptor(request -> request.header("Authorization", "Bearer " + token));
    }
    orders = new DataPlaneApi(client);
  }

  /**
   * Places a click and waits until it is decided. {@code clickId} is made by the page, so that a second tap or a reload
   * repeats the click.
   *
   * @throws ApiException a refusal, whose body is a problem with a {@code code}; or the last failure, if there was no
   *     outcome in time: the order may exist, and the same click tells later
   */
  public Order buy(String user, String sku, String clickId, Duration patience) throws ApiException, InterruptedException {
    OrderRequest request = new OrderRequest().userId(new OrderRequestUserId(user)).skuId(new OrderRequestSkuId(sku));
    Instant deadline = Instant.now().plus(patience);
    for (long pauseMs = 200; ; pauseMs = Math.min(2 * pauseMs, 2_000)) {
      ApiException failure;
      try {
        Order order = orders.placeOrder(request, clickId, "wait=7");
        if (!"undecided".equals(order.getStatus().getValue())) {
          return order;
        }
        failure = new ApiException(504, "the order is undecided");
      } catch (ApiException refused) {
        if (!REPEATED.contains(refused.getCode())) {
          throw refused;
        }
        failure = refused;
      }
      long retryAfterMs = retryAfterSeconds(failure) * 1_000;
      long waitMs = retryAfterMs + ThreadLocalRandom.current().nextLong(pauseMs);
      if (Instant.now().plusMillis(waitMs).isAfter(deadline)) {
        throw failure;
      }
      Thread.sleep(waitMs);
    }
  }

  private static long retryAfterSeconds(ApiException failure) {
    if (failure.getResponseHeaders() == null) {
      return 0;
    }
    return failure.getResponseHeaders().firstValueAsLong("Retry-After").orElse(0);
  }

  /** {@code URL TOKEN USER SKU CLICK}: places one order and prints its id and status. */
  public static void main(String[] args) throws Exception {
    Order order = new Buy(args[0], args[1]).buy(args[2], args[3], args[4], Duration.ofSeconds(20));
    System.out.println(order.getOrderId() + " " + order.getStatus().getValue());
  }
}

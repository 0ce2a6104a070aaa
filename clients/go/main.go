// Places one order: the rules of docs/CLIENTS.md over the generated calls.
//
//	go run . URL TOKEN USER SKU CLICK
//
// TOKEN is that of data_plane.token; empty if none is set.
package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"strconv"
	"time"

	"millrace.example/shop/millrace"
)

// Buy places a click and waits until it is decided. The page makes the click's id, so that a second tap or a reload
// repeats the click. An error that is no *Refused says that there was no outcome in time: the order may exist, and the
// same click tells later.
func Buy(ctx context.Context, orders *millrace.ClientWithResponses, user, sku, click string) (*millrace.Order, error) {
	var request millrace.OrderRequest
	if err := request.UserId.FromUserId(user); err != nil {
		return nil, err
	}
	if err := request.SkuId.FromSkuId(sku); err != nil {
		return nil, err
	}
	prefer := "wait=7"
	params := millrace.PlaceOrderParams{IdempotencyKey: &click, Prefer: &prefer}
	for pause := 200 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
		answer, err := orders.PlaceOrderWithResponse(ctx, &params, request)
		retryAfter := time.Duration(0)
		if err == nil {
			switch answer.StatusCode() {
			case http.StatusOK, http.StatusCreated, http.StatusAccepted:
				for _, order := range []*millrace.Order{answer.JSON200, answer.JSON201, answer.JSON202} {
					if order != nil && order.Status != millrace.OrderStatusUndecided {
						return order, nil
					}
				}
			// Under a key, repeating is safe whatever became of the request.
			case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
				seconds, _ := strconv.Atoi(answer.HTTPResponse.Header.Get("Retry-After"))
				retryAfter = time.Duration(seconds) * time.Second
			default:
				return nil, &Refused{Status: answer.StatusCode(), Problem: string(answer.Body)}
			}
		}
		select {
		case <-time.After(retryAfter + rand.N(pause)):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Refused is the final answer to a click that places no order.
type Refused struct {
	Status  int
	Problem string // JSON with a code, for programs
}

func (refused *Refused) Error() string { return refused.Problem }

func main() {
	url, token, user, sku, click := os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]
	// Longer than orders.timeout_ms, so that the server's answer comes first.
	client := &http.Client{Timeout: 10 * time.Second}
	authorize := func(_ context.Context, request *http.Request) error {
		if token != "" {
			request.Header.Set("Authorization", "Bearer "+token)
		}
		return nil
	}
	orders, err := millrace.NewClientWithResponses(url, millrace.WithHTTPClient(client), millrace.WithRequestEditorFn(authorize))
	if err != nil {
		panic(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	order, err := Buy(ctx, orders, user, sku, click)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(order.OrderId, order.Status)
}

// The pool and the queue under contention: phases keep their order, exceptions arrive, nothing is
// lost between spinning and sleeping, destruction waits. Meant for ThreadSanitizer.
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "errors.h"
#include "job_queue.h"
#include "thread_pool.h"

using namespace hybridk2;

namespace {

void test_phases_see_all_of_the_phase_before(const ThreadPlan& plan, bool spins_when_idle) {
  ThreadPool pool(plan, spins_when_idle);
  const int threads = pool.threads();
  std::vector<int> plain(threads, 0);  // not atomic on purpose: the barrier orders it
  for (int region = 0; region < 300; ++region) {
    for (int& value : plain) value = 0;
    pool.run(
        4,
        [&](int phase, int worker) {
          if (phase % 2 == 0) {
            for (const int value : plain) CHECK(value == phase);
          } else {
            plain[worker] = phase + 1;
          }
        },
        false);
    for (const int value : plain) CHECK(value == 4);
  }
}

void test_an_exception_ends_the_region_and_only_it(const ThreadPlan& plan) {
  ThreadPool pool(plan);
  const int threads = pool.threads();
  for (int round = 0; round < 100; ++round) {
    std::atomic<int> later{0};
    CHECK_THROWS(std::runtime_error, pool.run(
                                         3,
                                         [&](int phase, int worker) {
                                           if (phase == 1 && worker == round % threads) {
                                             throw std::runtime_error("worker");
                                           }
                                           if (phase == 2) ++later;
                                         },
                                         false));
    CHECK(later == 0);
    std::atomic<int> calls{0};
    pool.run(1, [&](int, int) { ++calls; }, false);
    CHECK(calls == threads);
  }
}

void test_a_sleeping_pool_wakes(const ThreadPlan& plan, bool spins_when_idle) {
  ThreadPool pool(plan, spins_when_idle);
  const int threads = pool.threads();
  for (int round = 0; round < 40; ++round) {
    std::this_thread::sleep_for(kSpin * (round % 4));  // before, around and after workers sleep
    std::atomic<int> calls{0};
    pool.run(2, [&](int, int) { ++calls; }, false);
    CHECK(calls == 2 * threads);
  }
}

void test_only_threads_with_a_cpu_each_spin_and_only_where_they_may() {
  ThreadPlan plan = plan_threads(simulated_nodes(1), 1);
  for (const bool a_cpu_each : {false, true}) {
    plan.a_cpu_each = a_cpu_each;
    CHECK(ThreadPool(plan, true).idle_spin() == (a_cpu_each ? kSpin : kSpin.zero()));
    CHECK(ThreadPool(plan, false).idle_spin() == kSpin.zero());
  }
}

void test_jobs_run_in_order_and_report_their_errors() {
  int started = 0;
  std::vector<int> order;
  std::vector<Ticket> tickets;
  {
    JobQueue queue([&] { ++started; }, kSpin, kSpin);
    for (int i = 0; i < 200; ++i) {
      tickets.push_back(queue.submit([&order, i] {
        order.push_back(i);
        if (i % 10 == 3) throw std::runtime_error(std::to_string(i));
      }));
    }
    CHECK_THROWS(std::runtime_error, tickets[33]->wait());
    CHECK_THROWS(std::runtime_error, tickets[33]->wait());
    tickets[34]->wait();
    tickets[43]->finish();
  }  // with tickets outstanding
  CHECK(started == 1);
  CHECK(order.size() == 200);
  for (size_t i = 0; i < order.size(); ++i) CHECK(order[i] == static_cast<int>(i));
  CHECK(tickets.back()->done());
  tickets.back()->wait();
  double last = 0;  // one after the other, those that threw as well
  for (const Ticket& ticket : tickets) {
    CHECK(last <= ticket->times().began && ticket->times().began <= ticket->times().ended);
    last = ticket->times().ended;
  }
}

void test_a_job_has_no_times_before_it_is_done() {
  std::atomic<bool> go{false};
  JobQueue queue([] {}, kSpin, kSpin);
  const Ticket ticket = queue.submit([&] {
    while (!go.load()) std::this_thread::yield();
  });
  CHECK_THROWS(StateError, ticket->times());
  go.store(true);
  ticket->wait();
  CHECK(ticket->times().began > 0);
}

void test_many_submit_and_wait_at_once() {
  JobQueue queue([] {}, kSpin, kSpin);
  int64_t total = 0;  // only the queue's thread touches it
  std::vector<std::thread> submitters;
  for (int s = 0; s < 4; ++s) {
    submitters.emplace_back([&queue, &total, s] {
      for (int i = 0; i < 200; ++i) {
        const Ticket ticket = queue.submit([&total] { ++total; });
        if (i % (s + 1) == 0) ticket->wait();
        if (i % 50 == 0) std::this_thread::sleep_for(2 * kSpin);
      }
    });
  }
  for (std::thread& submitter : submitters) submitter.join();
  queue.submit([] {})->wait();
  CHECK(total == 800);
}

}  // namespace

int main() {
  for (const auto& [threads, nodes] : {std::pair{1, 1}, {2, 1}, {3, 1}, {5, 1}, {2, 2}, {7, 3}}) {
    const ThreadPlan plan = plan_threads(simulated_nodes(nodes), threads);
    for (const bool spins_when_idle : {true, false}) {
      test_phases_see_all_of_the_phase_before(plan, spins_when_idle);
      test_a_sleeping_pool_wakes(plan, spins_when_idle);
    }
    test_an_exception_ends_the_region_and_only_it(plan);
  }
  test_only_threads_with_a_cpu_each_spin_and_only_where_they_may();
  test_jobs_run_in_order_and_report_their_errors();
  test_a_job_has_no_times_before_it_is_done();
  test_many_submit_and_wait_at_once();
  std::printf("%s\n", failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}

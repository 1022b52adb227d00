// Package podnetwork connects the pods of a kind cluster: it gives the node a CNI configuration made of
// its podCIDR, keeps a route to the podCIDR of every other node, and masquerades what leaves the pods'
// network. IPv4 only, and no NetworkPolicy: kind's own network program is not published as a Go module.
package podnetwork

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

const configFile = "/etc/cni/net.d/10-sock.conflist"

// NewCommand returns the program; it takes its settings from NODE_NAME, POD_SUBNET and, as long as there
// is no kube-proxy to reach the API server through, CONTROL_PLANE_ENDPOINT (host:port).
func NewCommand() *cobra.Command {
	return &cobra.Command{
		Use:          "pod-network",
		Short:        "Keep this node's CNI configuration and its routes to the pods of other nodes",
		Args:         cobra.NoArgs,
		SilenceUsage: true,
		RunE: func(*cobra.Command, []string) error {
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			return run(ctx, os.Getenv("NODE_NAME"), os.Getenv("POD_SUBNET"), os.Getenv("CONTROL_PLANE_ENDPOINT"))
		},
	}
}

func run(ctx context.Context, node, podSubnet, endpoint string) error {
	if node == "" || podSubnet == "" {
		return errors.New("NODE_NAME and POD_SUBNET must be set")
	}
	config, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	if endpoint != "" {
		config.Host = "https://" + endpoint
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	if err := masquerade(podSubnet); err != nil {
		return err
	}

	factory := informers.NewSharedInformerFactory(client, 0)
	nodes := factory.Core().V1().Nodes()
	changed := make(chan struct{}, 1)
	notify := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	if _, err := nodes.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { notify() },
		UpdateFunc: func(any, any) { notify() },
		DeleteFunc: func(any) { notify() },
	}); err != nil {
		return err
	}
	factory.Start(ctx.Done())

	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
		if err := sync(nodes.Lister(), node); err != nil {
			klog.ErrorS(err, "network of this node is not complete yet")
			time.AfterFunc(time.Second, notify)
		}
	}
}

// sync brings the CNI configuration and the routes to what the nodes in the lister say.
func sync(nodes listers.NodeLister, self string) error {
	all, err := nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	var failures []error
	for _, node := range all {
		if node.Spec.PodCIDR == "" {
			continue
		}
		if node.Name == self {
			failures = append(failures, writeConfig(node.Spec.PodCIDR))
		} else {
			failures = append(failures, route(node))
		}
	}
	return errors.Join(failures...)
}

func route(node *corev1.Node) error {
	_, pods, err := net.ParseCIDR(node.Spec.PodCIDR)
	if err != nil {
		return fmt.Errorf("podCIDR of node %s: %w", node.Name, err)
	}
	for _, address := range node.Status.Addresses {
		gateway := net.ParseIP(address.Address).To4()
		if address.Type != corev1.NodeInternalIP || gateway == nil {
			continue
		}
		if err := netlink.RouteReplace(&netlink.Route{Dst: pods, Gw: gateway}); err != nil {
			return fmt.Errorf("route to %s through %s: %w", pods, gateway, err)
		}
		return nil
	}
	return fmt.Errorf("node %s has no internal IPv4 address", node.Name)
}

// writeConfig replaces the configuration at once: containerd reads the directory whenever it changes.
func writeConfig(podCIDR string) error {
	type object = map[string]any
	config, err := json.MarshalIndent(object{
		"cniVersion": "1.0.0",
		"name":       "sock",
		"plugins": []object{
			{
				"type": "ptp",
				"ipam": object{
					"type":    "host-local",
					"dataDir": "/run/cni-ipam-state",
					"ranges":  [][]object{{{"subnet": podCIDR}}},
					"routes":  []object{{"dst": "0.0.0.0/0"}},
				},
			},
			{"type": "portmap", "capabilities": object{"portMappings": true}},
		},
	}, "", "  ")
	if err != nil {
		return err
	}
	if current, err := os.ReadFile(configFile); err == nil && bytes.Equal(current, config) {
		return nil
	}
	temporary := filepath.Join(filepath.Dir(configFile), ".10-sock.new")
	if err := os.WriteFile(temporary, config, 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, configFile)
}

func masquerade(podSubnet string) error {
	rule := []string{"POSTROUTING", "-s", podSubnet, "!", "-d", podSubnet, "-m", "addrtype", "!", "--dst-type", "LOCAL", "-j", "MASQUERADE"}
	iptables := func(action string) ([]byte, error) {
		return exec.Command("iptables", append([]string{"-w", "-t", "nat", action}, rule...)...).CombinedOutput()
	}
	if _, err := iptables("-C"); err == nil {
		return nil
	}
	if output, err := iptables("-A"); err != nil {
		return fmt.Errorf("masquerading of %s: %w: %s", podSubnet, err, bytes.TrimSpace(output))
	}
	return nil
}

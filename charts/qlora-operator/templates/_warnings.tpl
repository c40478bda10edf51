{{- /* What is allowed and may surprise, one line each; NOTES.txt ends with them. */ -}}
{{- define "qlora-operator.warnings" -}}
{{- if lt (int .Values.replicas) 2 }}
WARNING: replicas is 1: nobody takes over when its node dies, and no run starts or ends until the pod is back.
{{- end }}
{{- range $key, $image := dict "image" .Values.image "trainerImage" .Values.trainerImage }}
{{- if and (not $image.digest) (has $image.tag (list "latest" "main" "master" "edge" "nightly" "dev")) }}
WARNING: {{ $key }}.tag {{ $image.tag }} moves: attempts of one run may use different images. Set a version, or {{ $key }}.digest.
{{- end }}
{{- end }}
{{- if and .Values.platform.hub.mirror (not .Values.platform.s3.endpoint) }}
WARNING: platform.hub.mirror is for clusters without a way out, and platform.s3.endpoint is empty: the mirror is looked for at AWS.
{{- end }}
{{- if not (or .Values.platform.hub.mirror .Values.platform.hub.endpoint) }}
NOTE: models come from the public hub. In a cluster without a way out, set platform.hub.mirror.
{{- end }}
{{- if and .Values.crds.enabled (not .Values.crds.keep) }}
WARNING: crds.keep is false: helm uninstall deletes the CRD, and with it every QLoRAJob in the cluster.
{{- end }}
{{- if not .Values.rbac.create }}
WARNING: rbac.create is false: until you bind the rules of docs/operations.md to {{ include "qlora-operator.account" . }}, the operator waits.
{{- end }}
{{- range $key, $kind := dict "serviceMonitor" "ServiceMonitor" "podMonitor" "PodMonitor" "prometheusRule" "PrometheusRule" }}
{{- $settings := index $.Values.monitoring $key }}
{{- if and $settings.enabled (not (include "qlora-operator.monitored" (dict "root" $ "settings" $settings "kind" $kind))) }}
WARNING: monitoring.{{ $key }} was left out: the cluster serves no {{ $kind }}. Install the Prometheus operator and upgrade the release.
{{- end }}
{{- end }}
{{- end -}}
